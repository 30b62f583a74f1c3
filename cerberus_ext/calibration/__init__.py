"""The parts of `calibrate`: what a step costs, what its drafts are worth, what to do about it, where that is kept."""
