"""A Ray cluster of two nodes of a CPU each, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    """Its address. Workers begin in the folder, and import from there first: not from the sources."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # also where this machine has other work
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "120000")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "120000")
    monkeypatch.chdir(folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()
