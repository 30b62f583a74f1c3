"""What the commands share: Python's garbage collector while they load."""

from __future__ import annotations

import gc

import pytest

from cerberus_ext.cli.shared import uncollected


def test_the_collector_is_off_inside_alone() -> None:
    """Also where one is inside another, and where loading fails."""
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with pytest.raises(OSError), uncollected():
            raise OSError
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_who_has_turned_it_off_keeps_it_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
