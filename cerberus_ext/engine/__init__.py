"""Decoding: the loop, its arguments and the text that it generates."""
