"""Files and machines: what is read, written and described outside of decoding."""
