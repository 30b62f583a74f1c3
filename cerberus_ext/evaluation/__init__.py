"""The parts of `cerberus_ext.evaluate`, which is what users call.

    ways.py       what is compared: a way to generate is a name and a `run`; those that are built in, and a user's own
    measuring.py  runs the ways in turns over the questions, and checks that their texts are the same
    results.py    what was measured, a JSON line each, so that a run that was stopped goes on
    numbers.py    results -> the summary: speed-ups with intervals, tokens a step, times
    timing.py, bootstrap.py, texts.py, tokens.py    what these need
    tables.py, plots.py, page.py    the summary as Markdown, as PNG, and as one HTML page

The order is that of a run.
"""
