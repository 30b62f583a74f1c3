"""Threads after a fork: a child has none of the threads that OpenMP made for its parent, and waits for them for ever.

So the first work in a forked child is done with one thread, once the child is known to be one. Nothing happens at the
fork itself but that it is noted.
"""

from __future__ import annotations

import os
import warnings

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def threads_after_fork() -> None:
    """To be called before ops run: makes torch use one thread in a child that was forked, and says so once.

    Whoever calls torch.set_num_threads afterwards gets what he asks for.
    """
    global _forked
    if not _forked:
        return
    _forked = False
    import torch

    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "cerberus_ext: this process was forked, and the threads of its parent are not in it: it uses one thread;"
            ' start processes by multiprocessing\'s "spawn" to use more',
            RuntimeWarning,
            stacklevel=3,
        )
