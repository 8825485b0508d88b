"""A vector depends on its text alone; the process it is computed in is left as it was."""

import asyncio
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import minilm

ODD_TEXTS = list(json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8")).values())


@pytest.fixture
def texts(own_sentences):
    return own_sentences[:24]


@pytest.mark.parametrize("batch_size", [1, 3, 32, 1_000])
def test_packing_changes_nothing(encoder, texts, batch_size):
    alone = np.stack([encoder.encode(text, on_truncate="ignore") for text in texts + ODD_TEXTS])
    shuffled = list(range(len(alone)))
    random.Random(batch_size).shuffle(shuffled)
    rows = encoder.encode([(texts + ODD_TEXTS)[i] for i in shuffled], batch_size=batch_size, on_truncate="ignore")
    assert np.abs(rows - alone[shuffled]).max() <= 1e-6


def test_the_same_input_twice_is_equal_to_the_bit(encoder, texts):
    assert np.array_equal(encoder.encode(texts), encoder.encode(texts))


@pytest.mark.parametrize("thread_count", [1, 2, 3, 8])
def test_deterministic_vectors_are_equal_to_the_bit(encoder, texts, thread_count):
    everything = texts + ODD_TEXTS
    expected = {text: encoder.encode(text, deterministic=True, on_truncate="ignore") for text in everything}
    before = torch.get_num_threads()
    torch.set_num_threads(thread_count)
    try:
        for batch_size in (1, 7, 32):
            random.Random(batch_size).shuffle(everything)
            some = everything[: 5 * batch_size]
            options = {"batch_size": batch_size, "deterministic": True, "on_truncate": "ignore"}
            for text, row in zip(some, encoder.encode(some, **options), strict=True):
                assert row.tobytes() == expected[text].tobytes()
        assert torch.get_num_threads() == thread_count
    finally:
        torch.set_num_threads(before)


def test_eight_threads_at_once(encoder, texts):
    expected = [encoder.encode(texts[i : i + 3]) for i in range(8)]
    results = [[] for _ in range(8)]

    def work(i):
        for round_ in range(4):
            results[i].append(encoder.encode(texts[i : i + 3]))
            results[i].append(encoder.encode(texts[i : i + 3], deterministic=round_ % 2 == 0))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    deterministic = [encoder.encode(texts[i : i + 3], deterministic=True) for i in range(8)]
    for i, rows in enumerate(results):
        assert len(rows) == 8
        for index, row in enumerate(rows):
            assert np.array_equal(row, (deterministic if index % 4 == 1 else expected)[i])


def test_under_asyncio(encoder, texts):
    async def gather():
        return await asyncio.gather(*(asyncio.to_thread(encoder.encode, text) for text in texts[:6]))

    for text, vector in zip(texts, asyncio.run(gather()), strict=False):
        assert np.array_equal(vector, encoder.encode(text))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"precision": "int8"}], ids=str)
def test_the_process_is_left_as_it_was(canonical_folder, texts, options):
    own_encoder = minilm.load(canonical_folder, device="cpu")

    def state():
        return dict(os.environ), torch.get_num_threads(), torch.get_rng_state().tolist(), random.getstate()

    before, numpy_before = state(), np.random.get_state()[1].tolist()
    own_encoder.encode(texts, **options)
    assert state() == before
    assert np.random.get_state()[1].tolist() == numpy_before


def test_loading_leaves_the_random_state(canonical_folder):
    before = torch.get_rng_state()
    minilm.load(canonical_folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
