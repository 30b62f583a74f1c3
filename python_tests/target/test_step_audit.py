"""Reading a step call by call: what is covered, what is named, and when a step has to be filled up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cerberus_ext.runtime.capability import _TREE
from cerberus_ext.target import row_invariant, step_audit
from cerberus_ext.target.row_invariant import InvariantWeight
from cerberus_ext.target.step_audit import Audit, padded_nodes

NODES = _TREE.size
X = torch.randn(1, NODES, 64)


@pytest.mark.parametrize(
    ("nodes", "widths", "threads", "want"),
    [
        (1, [], 8, 1),
        (5, [], 8, 5),
        (1, [64], 2, 1),
        (7, [64], 2, 7),
        (1, [32], 2, None),  # a plain step is never filled up
        (7, [32], 2, 8),
        (5, [32, 16], 1, 8),
        (2, [1], 1, None),  # 64 nodes are further than a step is filled up
        (1, [14336], 8, 1),
        (2, [14336], 8, 2),
        (5, [14336], 8, 6),  # 71680 elements in 3 shares of 23894; 86016 in 3 of 28672
        (5, [14336], 1, 5),
        (5, [14336], 2, 5),
        (3, [32768], 2, 3),
        (1, [65535], 2, None),  # shares of 32768 and 32767
        (3, [49152], 8, 4),  # 147456 elements in 5 shares of 29492; 196608 in 6 of 32768
        (7, [49152], 8, 7),
    ],
)
def test_padded_nodes(nodes: int, widths: list[int], threads: int, want: int | None) -> None:
    assert padded_nodes(nodes, widths, threads) == want


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [256, 1536, 14336])
def test_shares_are_whole_vectors(width: int, threads: int) -> None:
    for nodes in range(1, 40):
        size = padded_nodes(nodes, [width], threads)
        if size is not None:
            shares = 1 if size * width < step_audit._SHARE else min(threads, -(-size * width // step_audit._SHARE))
            assert nodes <= size <= nodes + step_audit.MAX_PADDING and size * width % 64 == 0
            assert -(-size * width // shares) % 64 == 0


def read(function: Any, *arguments: Any) -> Audit:
    audit = Audit(NODES)
    with audit:
        function(*arguments)
    return audit


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(-1, keepdim=True) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: F.layer_norm(x, (64,)),
        lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
        lambda x: torch.cat([-x[..., 32:], x[..., :32]], -1).transpose(1, 2).contiguous(),
        lambda x: x.topk(2, dim=-1),
        lambda x: F.linear(x, torch.ones(8, 64)),
        lambda x: x @ torch.ones(64, 8),
        lambda x: torch.arange(NODES).float()[None, :, None] @ torch.ones(1, 1, 4),  # rotary frequencies
        lambda x: x.norm(dim=-1),
        lambda x: x**2 / 3 + x.clamp(-1, 1),
        lambda x: x.sort(-1).values + x.topk(2, -1).values[..., :1] + x.norm(2, -1, True),
        lambda x: F.normalize(x, 2.0, -1),
        lambda x: (x > 0).cumsum(1),  # integers are exact in any order
    ],
)
def test_covered(function: Any) -> None:
    assert read(function, X).uncovered is None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.mean(1), "mean"),
        (lambda x: x.mean(), "mean"),
        (lambda x: x.repeat(1, 1, 512).mean(-1), "mean"),  # of one row alone, torch splits the sum over threads
        (lambda x: x.sum((0, 1)), "sum"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: F.softmax(x, dim=1), "softmax"),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), "bmm"),
        (lambda x: torch.ones(1, NODES, NODES) @ x, "matmul"),
        (lambda x: torch.einsum("bnd,bmd->bnm", x, x), "einsum"),
        (lambda x: F.batch_norm(x[0], torch.zeros(64), torch.ones(64)), "batch_norm"),
        (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(64, 64, 3), padding=1), "conv1d"),
        (lambda x: x.norm(), "norm"),
        (lambda x: x.norm(2, 1), "norm"),
        (lambda x: F.normalize(x, 2.0), "normalize"),
        (lambda x: F.normalize(x, 2.0, 1), "normalize"),
        (lambda x: x.topk(2, 1), "topk"),
        (lambda x: x.topk(2, dim=1), "topk"),
        (lambda x: x.sort(1), "sort"),
        (lambda x: x.argsort(dim=1), "argsort"),
        (lambda x: F.layer_norm(x, (NODES, 64)), "layer_norm"),
        (lambda x: x.add(x, alpha=0.3), "add"),
        (lambda x: x.bfloat16().rsqrt(), "rsqrt"),
        (lambda x: x.half() ** -0.5, "pow"),
        (lambda x: x.clamp(max=1) if x.isinf().any() else x, "any"),
        (lambda x: x.abs().max(), "max"),
        (lambda x: x**1.7, "pow"),
        (lambda x: torch.log1p(x.abs()), "log1p"),
        (lambda x: torch.nn.functional.linear(x.double(), torch.ones(8, 64).double()), "linear"),
    ],
)
def test_named(function: Any, name: str) -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    assert read(Mixer(), X).uncovered == f"Mixer calls {name}"


def test_the_tree_of_the_reading_is_no_small_sum() -> None:
    """Or a sum over its nodes would count as one of few terms, which is covered."""
    assert NODES > row_invariant._MAX_TERMS
    assert not read(lambda x: x[:, : row_invariant._MAX_TERMS].sum(1), X).uncovered


def test_the_first_call_is_named() -> None:
    assert read(lambda x: (x.cumsum(1), x.mean(1)), X).uncovered == "Audit calls cumsum"


class TestWay:
    """Which calls have to be seen in later steps."""

    def test_weights_of_modules_are_seen_anyhow(self) -> None:
        audit = read(nn.Linear(64, 8), X)
        assert not audit.sees_all and audit.widths == set()

    @pytest.mark.parametrize(
        "function", [lambda x: F.linear(x, torch.ones(8, 64)), lambda x: x.unflatten(-1, (4, 16)).sum(2)]
    )
    def test_other_products_and_small_sums_are_not(self, function: Any) -> None:
        assert read(function, X).sees_all

    def test_functions_of_single_elements_may_be_left_to_torch(self) -> None:
        audit = read(lambda x: F.silu(x)[..., :48] * torch.tanh(x[..., :48].contiguous()), X)
        assert audit.widths == {64, 48} and not audit.sees_all

    def test_but_not_where_they_are_laid_out_otherwise(self) -> None:
        assert read(lambda x: F.silu(x[..., :48]), X).sees_all
        assert read(lambda x: torch.sigmoid(x[0, :, 0]).sum, X).sees_all
        assert read(lambda x: torch.tanh(torch.ones(3)), X).sees_all

    def test_a_weight_is_no_less_a_weight_as_a_view(self) -> None:
        class Half(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return F.linear(input, self.weight[:4])

        assert not read(Half(64, 8), X).sees_all
        weight = InvariantWeight.of(torch.ones(8, 64))
        assert read(lambda x: F.linear(x, weight), X).uncovered is None
