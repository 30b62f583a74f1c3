"""bench/in_flight.py reads from a listing of machine code what its loops keep in flight."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # last: bench/batches.py is no helper

import in_flight  # noqa: E402

NAME = "_ZN8cerberus17head_stack_kernelINS_7ProductI13__nv_bfloat16Li8ELi2EEEEEv"
RING = [
    "DEPBAR.LE SB0, 0x7",
    "LDS.128 R16, [R77]",
    "HMMA.16816 R40, R44, R20, R40",
    "LDGSTS.E.BYPASS.128 [R77]",
]
LOOP = [*RING, "LDGDEPBAR", "@P0 BRA 0x0"]


def listing(*code: str, waits: dict[int, int] | None = None, name: str = NAME) -> str:
    """As cuobjdump -sass prints it; waits: of an instruction, the scoreboard that it waits for."""
    lines = ["\tcode for sm_90", f"\t\tFunction : {name}"]
    for i, text in enumerate(code):
        board = (waits or {}).get(i)
        control = 0 if board is None else 1 << 52 + board
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;        /* 0x{i:016x} */")
        lines.append(f"                                                                  /* 0x{control:016x} */")
    return "\n".join(lines)


def stages(text: str) -> int:
    ((architecture, _, code),) = in_flight.decode(text)
    assert architecture == "sm_90"
    return in_flight.in_flight(code)


def test_a_ring_keeps_what_its_wait_leaves() -> None:
    assert stages(listing(*LOOP)) == 7
    assert stages(listing(LOOP[0].replace("0x7", "0x5"), *LOOP[1:])) == 5
    assert stages(listing(*LOOP, waits={2: 5})) == 7, "another scoreboard"


def test_a_loop_without_a_ring_keeps_nothing() -> None:
    assert stages(listing(*LOOP, waits={2: 0})) == 0, "an instruction waits for all copies"
    assert stages(listing(*LOOP[1:])) == 0, "no wait"
    assert stages(listing("LDG.E.128 R16, [R18]", RING[2], "@P0 BRA 0x0")) == 0
    assert stages(listing(*LOOP[:-1], "EXIT")) == 0, "no loop"


def test_of_nested_loops_the_inner_one_counts() -> None:
    outer = ["DEPBAR.LE SB0, 0x0", *LOOP[:-1], "@P0 BRA 0x10", "@P1 BRA 0x0"]
    assert stages(listing(*outer)) == 7


def test_every_kernel_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        NAME.replace("head_stack_kernel", kernel).replace("13__nv_bfloat16Li8", product)
        for kernel in in_flight.KERNELS
        for product in ("13__nv_bfloat16Li8", "6__halfLi8", "fLi4")
    ]
    blocks = NAME.replace("head_stack_kernel", in_flight.OF_BLOCKS)
    dense = "7ProductI13__nv_bfloat16Li8ELi2E"
    names += [blocks.replace(dense, f"12BlockProductILNS_7PackingE{kind}ELi4E") for kind in in_flight.PACKINGS]
    everything = "\n".join(listing(*LOOP, name=name) for name in names)
    assert in_flight.report(everything, 7)
    assert not in_flight.report(everything, 8)
    out = capsys.readouterr().out
    assert "sm_90 head_stack_kernel bfloat16, 32 rows: 7 stages in flight" in out
    assert "sm_90 step_product_kernel four bits, 64 rows: 7 stages in flight" in out
    assert not in_flight.report(everything.replace("draft_topk_parts", "another"), 6)
    assert "draft_topk_parts_kernel float32: not there" in capsys.readouterr().out
    assert not in_flight.report(everything.replace("PackingE6", "PackingE9"), 6)


def test_without_the_tools_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(in_flight, "tool", lambda: None)
    monkeypatch.setattr(sys, "argv", ["in_flight.py", "_cuda.so"])
    in_flight.main()
    assert capsys.readouterr().out.startswith("skipped: there is no cuobjdump")
