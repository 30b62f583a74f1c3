"""The parts of `calibrate`: what a step costs, what its guesses are worth, what to do about it, where that is kept."""
