"""What one training step computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cerberus_ext.ops import reference
from cerberus_ext.training.distill import counted, distillation, head_states
from cerberus_ext.training.start import frequent_tokens


@pytest.mark.parametrize("chained", [True, False])
def test_head_states_equal_the_reference(chained: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 16, 32 if chained else 16, generator=draw) * 0.3
    bias = torch.randn(3, 4, 16, generator=draw)
    hidden, anchor = torch.randn(2, 5, 16, generator=draw)
    expected = reference.head_stack(hidden, anchor, weight, bias).transpose(0, 1)
    torch.testing.assert_close(head_states(hidden, anchor, weight, bias, torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_distillation_is_the_kl_divergence_and_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    heads, segments, width, size, vocab = 3, 2, 4, 8, 11
    states = torch.randn(heads, segments * width, size, generator=draw, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(vocab, size, generator=draw, dtype=torch.float64)
    teacher = torch.randn(segments, width + heads - 1, vocab, generator=draw, dtype=torch.float64)
    left = torch.tensor([[9, 8, 7, 6], [2, 1, 0, 5]])
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(heads):
        student = (states[k] @ projection.T).log_softmax(-1).view(segments, width, vocab)
        target = teacher[:, k : k + width].log_softmax(-1)
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        expected = expected + 0.8**k * divergence[left > k].mean()
    expected.backward()
    loss, gradient = distillation(states.detach(), projection, teacher, left, counted(left, heads), 0.8)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, states.grad)


def test_distillation_without_any_position_is_zero() -> None:
    left = torch.zeros(1, 4, dtype=torch.int64)
    loss, gradient = distillation(
        torch.ones(2, 4, 3), torch.ones(5, 3), torch.ones(1, 5, 5), left, counted(left, 2), 0.8
    )
    assert loss == 0 and not gradient.any()


def test_shares_of_a_batch_add_up() -> None:
    """Counted positions are not spread evenly, yet the parts' losses and gradients sum to those of the whole."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4 * 3, 8, generator=draw)
    projection, teacher = torch.randn(11, 8, generator=draw), torch.randn(4, 4, 11, generator=draw)
    left = torch.tensor([[9, 8, 7], [0, 5, 4], [1, 0, 1], [0, 0, 9]])
    counts = counted(left, 2)
    assert counts.tolist() == [8, 6]
    loss, gradient = distillation(states, projection, teacher, left, counts, 0.8)
    whole = states.view(2, 4, 3, 8)
    parts = [
        distillation(whole[:, part].reshape(2, -1, 8), projection, teacher[part], left[part], counts, 0.8)
        for part in (slice(0, 4, 2), slice(1, 4, 2))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    for part, (_, found) in zip((slice(0, 4, 2), slice(1, 4, 2)), parts, strict=True):
        torch.testing.assert_close(found.view(2, 2, 3, 8), gradient.view(2, 4, 3, 8)[:, part])


@pytest.mark.parametrize("chained", [True, False])
def test_bfloat16_products_are_near_the_float32_ones(chained: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 16, 32 if chained else 16, generator=draw) * 0.3
    bias, rows = torch.randn(2, 3, 16, generator=draw), torch.randn(2, 8, 16, generator=draw)
    exact, rounded = (head_states(*rows, weight, bias, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    projection, teacher = torch.randn(11, 16, generator=draw), torch.randn(2, 6, 11, generator=draw)
    left = torch.full((2, 4), 9)
    counts = counted(left, 3)
    results = [
        distillation(exact, projection.to(dtype), teacher, left, counts, 0.8)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(tensor.dtype == torch.float32 for result in results for tensor in result)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.03, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.1, atol=0.01)


def test_frequent_tokens() -> None:
    tokens = torch.tensor([5, 5, 5, 2, 2, 7, 7, 9])
    assert frequent_tokens(tokens, 3, 12).tolist() == [2, 5, 7]
    assert frequent_tokens(tokens, 6, 12).tolist() == [0, 1, 2, 5, 7, 9]  # never seen: the lowest ids
