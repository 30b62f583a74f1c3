from tape import recorders

__all__ = ["recorders"]
