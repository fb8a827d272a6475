"""Tests that global batches depend only on seed and step, however they are shared and wherever one starts."""

from __future__ import annotations

import random

import pytest
import torch

from layerboost.text.batches import BatchError, GlobalBatches, PackedText


def _text(n: int, tokens: int = 3, *, full: bool = False) -> PackedText:
    """Makes row i of the token i; `full` adds positions and targets that also differ between rows."""
    rows = torch.arange(n, dtype=torch.int32)[:, None].expand(n, tokens)
    if not full:
        return PackedText(rows)
    return PackedText(rows, rows + 100, torch.arange(tokens)[None] > rows % tokens)


def _rows(batch: PackedText) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def test_rows_are_taken_with_their_positions_and_targets():
    text = _text(9, full=True)
    for part in (text[2:5], text[torch.tensor([2, 3, 4])], list(text.split(3))[1][-1:]):
        assert torch.equal(part.position_ids, part.input_ids + 100)
        assert torch.equal(part.targets, torch.arange(3)[None] > part.input_ids % 3)
    assert _rows(text[2:5]) == [2, 3, 4] and _rows(text[-2:]) == [7, 8]
    assert len(text) == 9 and text.sequence_tokens == 3


def test_a_model_gets_what_is_there_in_the_types_that_it_takes():
    assert {name: value.dtype for name, value in _text(2, full=True).tensors().items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "targets": torch.bool,
    }
    plain = _text(2)
    assert list(plain.tensors()) == ["input_ids"] == list(plain.to("cpu").tensors())


def test_targets_are_counted_without_each_rows_first_token():
    assert _text(4).n_targets == 4 * 2
    assert _text(4, full=True).n_targets == 2 + 1 + 0 + 2
    everything = PackedText(torch.zeros(2, 5), targets=torch.ones(2, 5, dtype=torch.bool))
    assert everything.n_targets == 2 * 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 7])
def test_workers_share_a_batch_whatever_their_number(world_size):
    batches = GlobalBatches(_text(20, full=True), 7, seed=3)
    for step in (0, 2, 3, 11):
        batch = batches.batch(step)
        shares = list(batch.split(world_size))
        assert [row for share in shares for row in _rows(share)] == _rows(batch) == batches.indices(step).tolist()
        assert sum(share.n_targets for share in shares) == batch.n_targets
        sizes = [len(share) for share in shares]
        assert len(sizes) == world_size and max(sizes) - min(sizes) <= 1


def test_each_epoch_uses_each_row_once_in_another_order():
    draw = random.Random(0)
    for _ in range(10):
        n, batch_sequences = draw.randint(2, 30), draw.randint(1, 40)
        batches = GlobalBatches(_text(n), batch_sequences, seed=draw.randrange(100))
        n_steps = -(-3 * n // batch_sequences)
        order = [row for step in range(n_steps) for row in _rows(batches.batch(step))]
        epochs = [order[start : start + n] for start in range(0, 3 * n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert n < 8 or len(set(map(tuple, epochs))) == 3
        assert batches.tokens_per_step == batch_sequences * 3


def test_any_step_can_be_asked_for_first_and_again():
    def batches(seed: int = 1) -> GlobalBatches:
        return GlobalBatches(_text(20), 6, seed)

    undisturbed = batches()
    in_order = [_rows(undisturbed.batch(step)) for step in range(12)]
    for step in (11, 3, 0, 7, 7):
        assert _rows(batches().batch(step)) == in_order[step] == _rows(undisturbed.batch(step))
    assert [_rows(batches(seed=2).batch(step)) for step in range(12)] != in_order


def test_what_cannot_be_batched_says_so():
    with pytest.raises(BatchError, match="step: -1"):
        GlobalBatches(_text(20), 6).batch(-1)
    with pytest.raises(BatchError, match="batch_sequences: 0"):
        GlobalBatches(_text(20), 0)
    with pytest.raises(BatchError, match="sequences: there are none"):
        GlobalBatches(_text(0), 1)
    with pytest.raises(BatchError, match=r"sequences: shape \(5,\)"):
        PackedText(torch.zeros(5))
    for name in ("position_ids", "targets"):
        with pytest.raises(BatchError, match=rf"{name}: shape \(2, 4\) is not that of the tokens, \(2, 3\)"):
            PackedText(torch.zeros(2, 3), **{name: torch.zeros(2, 4)})
