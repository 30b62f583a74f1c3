"""The commands of `cerberus`, one file each; `shared.py`: the options and messages that several have in common."""
