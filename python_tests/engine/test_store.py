"""Calibrations are found for the machine and the heads that they were made for, and for no others."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from memorized import untrained
from tiny_models import prompt, tiny_model

from cerberus_ext import decode
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from cerberus_ext.drafting.heads import CerberusHeads
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import TreePolicy
from cerberus_ext.engine import calibration_entries as entries
from cerberus_ext.engine import calibration_store as store
from cerberus_ext.engine.budget import Costs
from cerberus_ext.engine.calibration_store import Calibration, Expected, find, heads_fingerprint, key_of, place, save
from cerberus_ext.engine.plan import make_plan

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
TREE = DynamicPolicy(5)
EXPECTED = np.array([1.0, 1.7, 2.1, 2.4, 2.5, 2.6, 2.7, 2.8])
GATES: dict[str, Gate] = {
    "open": AlwaysOpen(),
    "entropy": EntropyGate(2.5),
    "confidence": ConfidenceGate({1: 1.0, 8: 1.5}, 0.1),
    "rate": ConfidenceGate({1: 0.1, 8: 0.15}, rate=12.5),
}


def make_heads(seed: int = 0) -> CerberusHeads:
    heads = untrained(tiny_model("llama"), num_heads=2)
    torch.manual_seed(seed)
    torch.nn.init.normal_(heads.weight, std=0.01)
    return heads


def saved_heads(folder: Path, seed: int = 0) -> CerberusHeads:
    make_heads(seed).save_pretrained(folder)
    return CerberusHeads.from_pretrained(folder)


def entry(
    heads: CerberusHeads,
    threads: int = 2,
    gate: Gate = GATES["open"],
    tree: TreePolicy = TREE,
) -> Calibration:
    device, dtype, count = key_of(CPU, torch.float32, threads)
    expected, own = Expected(50.0, 25.0, 1.9, 1.0, 0.25), heads_fingerprint(heads)
    return Calibration(device, dtype, count, own, "model", tree, gate, expected, {"texts": 3})


def found(heads: CerberusHeads, threads: int = 2, dtype: torch.dtype = torch.float32) -> Calibration | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find(heads, CPU, dtype, threads)


def same_gate(one: Gate, other: Gate) -> bool:
    return entries.gate_to_json(one) == entries.gate_to_json(other) and type(one) is type(other)


@pytest.mark.parametrize("name", GATES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    heads = saved_heads(tmp_path / "heads")
    put = entry(heads, gate=GATES[name])
    assert save(heads, put) == tmp_path / "heads" / "calibration.json"
    back = found(CerberusHeads.from_pretrained(tmp_path / "heads"))
    assert back is not None and same_gate(back.gate, put.gate)
    assert (back.key, back.tree, back.expected, back.details) == (put.key, put.tree, put.expected, put.details)
    assert back.expected.speed_up == 2.0
    signals = Signals(5, None, 2.0, EXPECTED[:5])
    assert back.gate.decide(signals) == put.gate.decide(signals)


def test_round_trip_of_no_drafts(tmp_path: Path) -> None:
    """Where nothing is faster than plain decoding."""
    heads = saved_heads(tmp_path / "heads")
    save(heads, entry(heads, tree=StaticPolicy.root()))
    back = found(CerberusHeads.from_pretrained(tmp_path / "heads"))
    assert back is not None and back.tree == StaticPolicy.root()


@pytest.mark.parametrize("platt", [None, ((0.9, 0.1), (1.1, 0.0))])
def test_round_trip_of_a_dynamic_tree(platt: tuple | None, tmp_path: Path) -> None:
    """With a gate that chooses how many of its nodes."""
    heads = saved_heads(tmp_path / "heads")
    tree, gate = DynamicPolicy(8, 5, platt), ConfidenceGate({1: 1.0, 4: 1.2, 8: 3.0}, rate=0.8)
    save(heads, entry(heads, gate=gate, tree=tree))
    back = found(CerberusHeads.from_pretrained(tmp_path / "heads"))
    assert back is not None and same_gate(back.gate, gate) and back.tree == tree
    signals = Signals(8, expected_tokens=EXPECTED)
    assert back.gate.decide(signals) == gate.decide(signals) == 4


def test_round_trip_of_the_costs_of_batches(tmp_path: Path) -> None:
    """Entries from before they were measured have none."""
    heads = saved_heads(tmp_path)
    put = replace(entry(heads), batches=Costs({1: 1.0, 2: 1.25}, {2: 1.25, 8: 2.5}))
    file = save(heads, put)
    assert (back := found(heads)) is not None and back.batches == put.batches
    content = json.loads(file.read_text())
    del content["entries"][0]["batches"]
    file.write_text(json.dumps(content))
    assert (back := found(heads)) is not None and back.batches is None


def test_found_for_its_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = saved_heads(tmp_path)
    save(heads, entry(heads, threads=2))
    assert found(heads, threads=2) is not None
    assert found(heads, threads=1) is None and found(heads, dtype=torch.bfloat16) is None
    monkeypatch.setattr(store, "_device_name", lambda device: "another processor")
    assert found(heads, threads=2) is None


def test_files_of_the_first_format_are_refused(tmp_path: Path) -> None:
    """Entries of it have static trees, and gates with trees and corrections of their own."""
    heads = saved_heads(tmp_path)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"format_version": 1, "entries": [{
        **entry(heads).to_json(), "tree": "0 1 0.0",
        "gate": {"kind": "confidence", "costs": {"1": 1.0, "8": 1.5}, "trees": ["0", "0 1"], "margin": 0.1,
                 "rate": None, "platt": None},
    }]}))  # fmt: skip
    reason = "format_version must be 3, got 1"
    with pytest.warns(UserWarning, match=rf"defaults are used: .*{reason}\); remove it and calibrate again$") as said:
        assert find(heads, CPU, torch.float32, 2) is None
    assert len(said) == 1
    with pytest.raises(ValueError, match=rf"no file of calibrations \(ValueError: {reason}\); remove it"):
        save(heads, entry(heads))


def test_entries_of_other_machines_stay(tmp_path: Path) -> None:
    heads = saved_heads(tmp_path)
    save(heads, entry(heads, threads=1, gate=GATES["entropy"]))
    save(heads, entry(heads, threads=2))
    save(heads, entry(heads, threads=2, gate=GATES["confidence"]))
    assert len(store.read_entries(tmp_path / "calibration.json")) == 2
    assert isinstance(found(heads, 1).gate, EntropyGate) and isinstance(found(heads, 2).gate, ConfidenceGate)
    assert [file.name for file in tmp_path.glob("*partial*")] == []


def test_saving_is_seen_by_heads_that_looked_before(tmp_path: Path) -> None:
    heads = saved_heads(tmp_path)
    assert found(heads) is None
    save(heads, entry(heads))
    assert found(heads) is not None


def test_it_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = saved_heads(tmp_path)
    save(heads, entry(heads))
    kept: dict = {}
    first = find(heads, CPU, torch.float32, 2, kept=kept)
    monkeypatch.setattr(store, "read_entries", None)
    assert first is not None and find(heads, CPU, torch.float32, 2, kept=kept) is first


@pytest.mark.parametrize("where", ["memory", "packaged", "read-only"])
def test_elsewhere_it_is_kept_in_the_cache_folder(
    where: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = make_heads() if where == "memory" else saved_heads(tmp_path / "all" / "heads")
    if where == "packaged":
        monkeypatch.setattr(store, "PRETRAINED", tmp_path / "all")
    if where == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    file = save(heads, entry(heads))
    assert file == own_cache / "calibration" / f"{heads_fingerprint(heads)}.json" == place(heads)
    assert found(heads) is not None
    assert found(make_heads()) is not None, "the same weights" if where != "memory" else "another object"
    assert found(make_heads(seed=1)) is None


def test_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in some containers: `decode` goes on, and what is beside the heads is found."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(store, "cache_dir", fail)
    heads = make_heads()
    assert found(heads) is None
    with pytest.raises(OSError, match="set CERBERUS_CACHE to a folder"):
        save(heads, entry(heads))
    heads = saved_heads(tmp_path)
    save(heads, entry(heads))
    assert found(heads) is not None


def test_packaged_heads_may_bring_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = saved_heads(tmp_path / "all" / "heads")
    save(heads, entry(heads, gate=GATES["entropy"]))
    monkeypatch.setattr(store, "PRETRAINED", tmp_path / "all")
    heads = CerberusHeads.from_pretrained(tmp_path / "all" / "heads")
    assert isinstance(found(heads).gate, EntropyGate)
    save(heads, entry(heads, gate=GATES["confidence"]))
    assert isinstance(found(heads).gate, ConfidenceGate), "one's own is preferred"


def test_retrained_heads_do_not_use_it(tmp_path: Path) -> None:
    heads = saved_heads(tmp_path)
    save(heads, entry(heads))
    save(heads, entry(heads, threads=4))
    retrained, kept = saved_heads(tmp_path, seed=1), {}
    with pytest.warns(UserWarning, match=r"calibration.json was made with other heads, .* calibrate again") as said:
        for _ in range(2):
            assert find(retrained, CPU, torch.float32, 2, kept=kept) is None
    assert len(said) == 1
    save(retrained, entry(retrained))
    assert len(store.read_entries(tmp_path / "calibration.json")) == 1, "those of the old heads are gone"
    assert found(retrained) is not None


def test_fingerprint_is_that_of_the_weights() -> None:
    heads = make_heads()
    assert heads_fingerprint(heads) == heads_fingerprint(make_heads().to(torch.bfloat16))
    before = heads_fingerprint(heads)
    heads.weight.data[1, 1, 5, 7] *= -1
    assert heads_fingerprint(heads) != before


def change(**values: object):
    def of(text: str) -> str:
        content = json.loads(text)
        content["entries"][0].update(values)
        return json.dumps(content)

    return of


DAMAGE = {
    "cut": lambda text: text[:100],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "no entries": lambda text: '{"format_version": 3, "entries": [3]}',
    "newer format": lambda text: text.replace('"format_version": 3', '"format_version": 4'),
    "entries of another kind": lambda text: '{"format_version": 3, "entries": {}}',
    "nested": lambda text: "[" * 100_000,
    "no UTF-8": lambda text: "\udcff",
}
ODD = {
    "gate": change(gate={"kind": "magic"}),
    "no gate": change(gate=None),
    "threshold": change(gate={"kind": "entropy", "threshold": "low"}),
    "costs": change(gate={**entries.gate_to_json(GATES["confidence"]), "costs": {"8": 1.0}}),
    "tree": change(tree="0 1 0.0"),
    "a list": change(tree=[8]),
    "another key": change(tree={"size": 8, "depth": 3}),
    "expected": change(expected={"tokens": 3}),
    "dynamic tree": change(tree={"size": "8"}),
    "no size": change(tree={"drafts": 8}),
    "costs that end": change(tree={"size": 16}, gate=entries.gate_to_json(ConfidenceGate({1: 1.0, 8: 1.5}))),
    "huge": change(tree={"size": 10**7}),
    "huge size": change(tree={"size": 1025}),
    "size of another kind": change(tree={"size": 8.0}),
    "many drafts": change(tree={"size": 8, "drafts": 40}),
    "infinite cost": change(gate={**entries.gate_to_json(GATES["confidence"]), "costs": {"1": 1.0, "8": float("inf")}}),
    "text for a cost": change(gate={**entries.gate_to_json(GATES["confidence"]), "costs": {"1": "1"}}),
    "no number": change(gate={"kind": "entropy", "threshold": float("nan")}),
    "rate": change(gate={**entries.gate_to_json(GATES["rate"]), "rate": "fast"}),
    "details": change(details=3),
    "expected number": change(expected={**asdict(Expected(1, 1, 1, 1, 1)), "tokens_per_step": float("nan")}),
    "batches": change(batches={"texts": {"1": 1.0}}),
    "batches of no size": change(batches={"texts": {}, "nodes": {"2": 1.0}}),
    "no time": change(batches={"texts": {"1": 0.0}, "nodes": {"2": 1.0}}),
    "a correction": change(tree={"size": 8, "platt": [[1.0, 0.0]]}),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *ODD])
def test_damaged(damage: str, tmp_path: Path) -> None:
    """`decode` warns once and goes on; calibrating again is refused where another machine's entries would be lost."""
    heads = saved_heads(tmp_path)
    file = save(heads, entry(heads))
    text = (DAMAGE | ODD)[damage](file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="the defaults are used: .*/calibration.json"):
        assert find(heads, CPU, torch.float32, 2) is None
    heads = CerberusHeads.from_pretrained(tmp_path)
    threads = torch.get_num_threads()
    content = file.read_bytes()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for _ in range(2):
            decode(model, heads, prompt(), max_new_tokens=3)
    assert len([one for one in said if "calibration.json" in str(one.message)]) == (damage in DAMAGE or threads == 2)
    assert file.read_bytes() == content
    if damage in DAMAGE:
        with pytest.raises(ValueError, match=r"calibration.json is no file of calibrations .*; remove it"):
            save(heads, entry(heads))
        assert file.read_bytes() == text.encode(errors="surrogateescape")
    else:
        save(heads, entry(heads))
        assert found(heads) is not None


@pytest.mark.parametrize("kind", ["folder", "unreadable"])
def test_a_file_that_cannot_be_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = saved_heads(tmp_path)
    file = tmp_path / "calibration.json"
    if kind == "folder":
        file.mkdir()
    else:
        file.write_text("{}")

        def refuse(path: Path) -> bytes:  # also root may not, here
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(UserWarning, match="the defaults are used: .*/calibration.json"):
        assert find(heads, CPU, torch.float32, 2) is None
    with pytest.raises(OSError, match="calibration.json"):
        save(heads, entry(heads))


def test_entries_beside_a_damaged_one_are_used(tmp_path: Path) -> None:
    heads = saved_heads(tmp_path)
    save(heads, entry(heads, threads=1))
    file = save(heads, entry(heads, threads=2))
    content = json.loads(file.read_text())
    content["entries"][0]["tree"] = {"size": 10**7}
    file.write_text(json.dumps(content))
    heads = CerberusHeads.from_pretrained(tmp_path)
    assert found(heads, threads=2) is not None
    with pytest.warns(UserWarning, match="size must be in 2..1024, got 10000000; calibrate again"):
        assert find(heads, CPU, torch.float32, 1) is None


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = saved_heads(tmp_path)
    file = save(heads, entry(heads))
    before = file.read_text()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(heads, entry(heads, gate=GATES["entropy"]))
    assert file.read_text() == before and list(tmp_path.glob("*.partial")) == []


def test_heads_of_another_kind_have_none() -> None:
    assert find(object(), CPU, torch.float32, 2) is None


@pytest.mark.parametrize(
    ("given", "nodes"),
    [
        ({}, {1, 5}),  # calibrated gate and tree
        ({"tree": StaticPolicy.chain(1)}, {2}),  # that tree, always open
        ({"gate": AlwaysOpen()}, {TREE.size}),  # calibrated tree, that gate
    ],
)
def test_decode_uses_it(given: dict, nodes: set[int], tmp_path: Path) -> None:
    model, threads = tiny_model("llama"), torch.get_num_threads()
    heads = saved_heads(tmp_path)
    plain = decode(model, heads, prompt(), max_new_tokens=24)
    default = {size for size, _ in plain.stats.trace}
    # Opens about half of the time: head 1's best draft has a probability of 1 % to 90 %.
    gate = ConfidenceGate({1: 1.0, 5: 1.6})
    save(heads, entry(heads, threads, gate))
    out = decode(model, heads, prompt(), max_new_tokens=24, **given)
    assert out.sequences.equal(plain.sequences)
    used = {size for size, _ in out.stats.trace[:-3]}  # at the end trees are cut
    assert used == nodes != default


def test_which_of_them_decode_uses(tmp_path: Path) -> None:
    model, heads = tiny_model("llama"), saved_heads(tmp_path)
    batches = Costs({1: 1.0, 2: 1.25}, {2: 1.25, 8: 2.5})
    save(heads, replace(entry(heads, torch.get_num_threads()), batches=batches))
    save(heads, entry(heads, torch.get_num_threads() + 1, tree=DynamicPolicy(9)))
    plan = make_plan(model, heads)
    assert plan.costs == batches
    assert plan.policy == TREE and plan.policy.sizes == (1, 4, 5), "a calibrated size is recorded itself"
