"""Packing: nothing lost, nothing mixed up, and back."""

import random

import pytest
import torch

from minilm import PackedBatch

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11], [12, 13]]


def test_layout():
    batch = PackedBatch.from_sequences(SEQUENCES, [[0, 0, 1], [0], [0, 1, 1], [0, 0]])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert batch.type_ids.tolist() == [0, 0, 1, 0, 0, 1, 1, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7, 9]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.num_sequences, batch.num_tokens, batch.max_seqlen) == (4, 9, 3)


def test_layout_of_many_equals_that_of_each():
    rng = random.Random(0)
    sequences = [[rng.randrange(99) for _ in range(rng.choice((1, 2, 9)))] for _ in range(50)]
    batch = PackedBatch.from_sequences(sequences, [[number % 2] * len(ids) for number, ids in enumerate(sequences)])
    for index, ids in enumerate(sequences):
        assert batch.sequence(batch.ids, index).tolist() == ids
        assert batch.sequence(batch.positions, index).tolist() == list(range(len(ids)))
        assert batch.sequence(batch.type_ids, index).tolist() == [index % 2] * len(ids)
        assert batch.cu_seqlens[index : index + 2].diff().item() == len(ids)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([4], ((0, 1, 4),)),
        ([3, 3, 3], ((0, 3, 3),)),
        ([5, 2, 2, 1, 2], ((0, 1, 5), (5, 2, 2), (9, 1, 1), (10, 1, 2))),
    ],
    ids=str,
)
def test_runs_are_neighbours_of_one_length(lengths, runs):
    batch = PackedBatch.from_sequences([[7] * length for length in lengths])
    assert batch.runs == runs
    assert [length for _, count, length in batch.runs for _ in range(count)] == lengths


def test_length_groups_hold_every_token_once():
    batch = PackedBatch.from_sequences(SEQUENCES)
    groups = {rows.shape[1]: (indices.tolist(), batch.ids[rows].tolist()) for indices, rows in batch.length_groups}
    assert groups == {3: ([0, 2], [[5, 6, 7], [9, 10, 11]]), 1: ([1], [[8]]), 2: ([3], [[12, 13]])}


def test_pad_and_pack_are_inverse():
    batch = PackedBatch.from_sequences(SEQUENCES)
    padded, mask = batch.pad(batch.ids, value=-1)
    assert padded.tolist() == [[5, 6, 7], [8, -1, -1], [9, 10, 11], [12, 13, -1]]
    again = PackedBatch.from_padded(padded, mask)
    for name in ("ids", "positions", "type_ids", "cu_seqlens"):
        torch.testing.assert_close(getattr(again, name), getattr(batch, name), msg=name)
    assert again.lengths == batch.lengths


def test_padding_on_the_left_keeps_bert_positions():
    batch = PackedBatch.from_padded(torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert batch.ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [2, 0, 1, 2]


def test_sequence_is_a_view_of_its_rows():
    batch = PackedBatch.from_sequences(SEQUENCES)
    assert [batch.sequence(batch.ids, i).tolist() for i in range(4)] == SEQUENCES
    assert batch.sequence(batch.ids, 2).data_ptr() == batch.ids[4:].data_ptr()


def test_moving():
    moved = PackedBatch.from_sequences(SEQUENCES).to("meta")
    assert {t.device.type for t in (moved.ids, moved.positions, moved.type_ids, moved.cu_seqlens)} == {"meta"}
    assert moved.lengths == (3, 1, 3, 2)


@pytest.mark.parametrize("sequences", [[], [[1], []]], ids=["no-sequence", "empty-sequence"])
def test_empty_input_is_refused(sequences):
    with pytest.raises(ValueError, match="at least one sequence and a token in each"):
        PackedBatch.from_sequences(sequences)


def test_misfits_are_refused():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"of one shape \[B, S\], got \[2, 3\] and \[2, 2\]"):
        PackedBatch.from_padded(ids, torch.ones(2, 2))
    with pytest.raises(ValueError, match="a token in every row"):
        PackedBatch.from_padded(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"expected token_type_ids \[2, 3\]"):
        PackedBatch.from_padded(ids, torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="one entry for each token"):
        PackedBatch.from_sequences([[1, 2]], [[0]])
