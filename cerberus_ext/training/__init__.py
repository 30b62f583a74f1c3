"""The parts of `cerberus_ext.train`, which is what users call."""
