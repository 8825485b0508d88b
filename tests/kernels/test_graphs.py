"""CUDA graphs: which batch goes through which graph, and that nothing of another batch is left in it.

Without a GPU a stand-in records the computation itself: what is tested is all but the recording.
"""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from minilm import PackedBatch
from minilm.kernels import graphs
from minilm.kernels.graphs import BUCKETS, EncoderGraphs


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    """Stand in for CUDA's streams, events and graphs."""
    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None)
    stand_ins = {
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "current_stream": lambda: stream,
        "Stream": lambda: stream,
        "Event": lambda: SimpleNamespace(record=lambda: None),
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "capture", lambda step, _: step)


def compute(weight, seen=None):
    """Something that depends on every operand: sums over each token's sequence."""

    def sums(ids, type_ids, positions, cu_seqlens):
        if seen is not None:
            seen.append(len(ids))
        per_token = (ids + 10 * type_ids + 100 * positions).float() * weight
        out = torch.full((len(ids), 2), 7.0)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            out[start:end] = per_token[start:end].sum()
        return out

    return sums


def pack(*lengths):
    return PackedBatch.from_sequences([[100 + n + i for i in range(n)] for n in lengths])


def expected(batch, weight):
    return compute(weight)(batch.ids, batch.type_ids, batch.positions, batch.cu_seqlens)


def test_batches_of_any_shape_one_after_the_other():
    weight, made = torch.tensor(2.0), EncoderGraphs()
    for batch in (pack(30, 2), pack(1), pack(3, 3, 3, 3, 4), pack(16), pack(17), pack(*[1] * 16), pack(5)):
        ours = made.run(batch, [weight], compute(weight))
        assert torch.equal(ours, expected(batch, weight))


def test_a_result_outlives_the_next_replay():
    weight, made = torch.tensor(2.0), EncoderGraphs()
    first = made.run(pack(3), [weight], compute(weight))
    made.run(pack(4), [weight], compute(weight))
    assert torch.equal(first, expected(pack(3), weight))


def test_the_smallest_bucket_that_holds_a_batch():
    weight, seen, made = torch.tensor(2.0), [], EncoderGraphs(64)
    for tokens, bucket in ((1, 16), (16, 16), (17, 32), (40, 48), (64, 64)):
        made.run(pack(tokens), [weight], compute(weight, seen))
        assert seen[-1] == bucket
    assert made.covers(64)
    assert not made.covers(65)
    assert not EncoderGraphs(0).covers(1)


def test_nothing_is_recorded_twice_unless_a_weight_moves():
    weight, seen, made = torch.tensor(2.0), [], EncoderGraphs()
    for _ in range(3):
        made.run(pack(5), [weight], compute(weight, seen))
    assert len(seen) == 4  # once to compile, then three replays
    weight.mul_(2)  # in place: the graph reads the new value
    assert torch.equal(made.run(pack(5), [weight], compute(weight, seen)), expected(pack(5), weight))
    assert len(seen) == 5
    moved = torch.tensor(9.0)
    assert torch.equal(made.run(pack(5), [moved], compute(moved, seen)), expected(pack(5), moved))
    assert len(seen) == 7


def test_warm_up_records_every_bucket_the_largest_first():
    weight, seen, made = torch.tensor(2.0), [], EncoderGraphs(128)
    made.warm_up(torch.device("cpu"), [weight], compute(weight, seen))
    assert seen == [bucket for bucket in reversed(BUCKETS) if bucket <= 128]
    made.warm_up(torch.device("cpu"), [weight], compute(weight, seen))
    assert len(seen) == 6


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_recorded_in_one_mode_replayed_in_another(mode):
    weight, made = torch.tensor(2.0, requires_grad=True), EncoderGraphs()
    other = torch.no_grad if mode is torch.inference_mode else torch.inference_mode
    for each in (mode, other):
        with each():
            ours = made.run(pack(4), [weight], compute(weight))
        assert torch.equal(ours, expected(pack(4), weight))
        assert not ours.requires_grad


def test_threads_do_not_mix():
    weight, made, wrong = torch.tensor(2.0), EncoderGraphs(), []

    def work(tokens):
        batch = pack(tokens)
        truth = expected(batch, weight)
        wrong.extend(tokens for _ in range(50) if not torch.equal(made.run(batch, [weight], compute(weight)), truth))

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in (3, 7, 11, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
