"""Conditional drafts: parameters, tables, and the formula with a gradient."""

from __future__ import annotations

import torch

from cerberus_ext.drafting.conditional import ConditionalDrafts, conditional_logprobs, rms

SIZE, HEADS, RANK = 12, 4, 5


def test_new_ones_leave_the_drafts_as_they_are() -> None:
    drafts = ConditionalDrafts(SIZE, HEADS, RANK)
    assert drafts.queries.shape == (HEADS - 1, RANK, SIZE) and drafts.queries.std() > 0.1
    assert torch.equal(drafts.queries, ConditionalDrafts(SIZE, HEADS, RANK).queries)
    embeddings, rows = torch.randn(30, SIZE), torch.randn(20, SIZE)
    parents, table = drafts.tables(embeddings, rows, torch.arange(20))
    logprobs = torch.randn(HEADS - 1, 40).log_softmax(-1)[:, :7]
    given = parents[:, :3], table[torch.arange(7)].expand(HEADS - 1, -1, -1)
    found = conditional_logprobs(*given, logprobs, drafts.slopes, drafts.rest)
    torch.testing.assert_close(found[:, :, :7], logprobs[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(HEADS - 1, 3))


def test_new_ones_do_not_draw_from_the_users_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    ConditionalDrafts(SIZE, HEADS, RANK)
    assert torch.equal(torch.randn(2), expected)


def test_tables_are_those_of_the_formula() -> None:
    drafts = ConditionalDrafts(SIZE, HEADS, RANK)
    with torch.no_grad():
        drafts.keys.normal_()
    embeddings, rows, ids = torch.randn(30, SIZE) * 3, torch.randn(20, SIZE) * 0.1, torch.randperm(30)[:20]
    parents, table = drafts.tables(embeddings, rows, ids)
    assert parents.shape == (HEADS - 1, 20, RANK) and table.shape == (20, RANK)
    expected = embeddings[ids[7]] / embeddings.pow(2).mean().sqrt() @ drafts.queries[1].T
    torch.testing.assert_close(parents[1, 7], expected)
    torch.testing.assert_close(table[4], drafts.keys @ rows[4] / rms(rows))
    whole, _ = drafts.tables(embeddings, embeddings, None)
    torch.testing.assert_close(whole[:, ids], parents)


def test_every_parameter_gets_a_gradient() -> None:
    drafts = ConditionalDrafts(SIZE, HEADS, RANK)
    with torch.no_grad():
        drafts.keys.normal_()
    parents, table = drafts.tables(torch.randn(30, SIZE), torch.randn(20, SIZE), torch.arange(20))
    places = torch.randint(20, (HEADS - 1, 9, 6))  # of 9 positions, each with one parent
    logprobs = torch.randn(HEADS - 1, 9, 30).log_softmax(-1)[..., :6]
    found = conditional_logprobs(
        parents[:, :9, None], table[places], logprobs, drafts.slopes[:, None], drafts.rest[:, None]
    )
    assert found.shape == (HEADS - 1, 9, 1, 7)
    found[..., 0].sum().backward()
    for name, parameter in drafts.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
