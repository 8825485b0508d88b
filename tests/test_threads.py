"""Threads and forks: results as alone, and the process as it was."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from minilm import threads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_workers_compute_single_threaded_and_leave_the_count(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        seen = threads.map_single_threaded(lambda i: (i, torch.get_num_threads()), list(range(20)))
        assert seen == [(i, 1) for i in range(20)]
        assert torch.get_num_threads() == count
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [count]
    finally:
        torch.set_num_threads(before)


def test_no_items():
    assert threads.map_single_threaded(lambda i: i, []) == []


def test_an_error_comes_out_and_ends_the_work():
    done = []

    def fail(item):
        done.append(item)
        raise KeyError(item)

    with pytest.raises(KeyError):
        threads.map_single_threaded(fail, list(range(1_000)))
    assert len(done) <= torch.get_num_threads()


AFTER_FORK = """
import multiprocessing, os, signal, sys, tempfile
import numpy as np
import minilm

texts = [f"sentence number {i} of a few" for i in range(300)]
big = np.random.default_rng(0).normal(size=(1500, 384)).astype("float32")

def everything():
    encoder = minilm.load(sys.argv[1], device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        again = minilm.load(encoder.save(folder + "/saved"), device="cpu")
    hits = minilm.search(big[:70], big, top_k=2)
    half = again.to("cpu", "float16").encode(texts[0])
    stream = np.stack(list(encoder.encode_stream(texts, precision="int8")))
    scores = minilm.similarity(big, big).numpy(), minilm.similarity_pairwise(big, big).numpy()
    return (encoder.encode(texts), encoder.encode(texts[:9], deterministic=True), half, stream, *scores,
            np.array([hit["corpus_id"] for row in hits for hit in row]), np.array(encoder.fingerprint()))

expected = everything()  # starts torch's threads

def work(_):
    signal.alarm(100)
    return all(np.array_equal(a, b) for a, b in zip(expected, everything()))

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(2)) == [True] * 2
if os.fork() == 0:
    os._exit(0 if work(0) else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_encode_as_their_parent(canonical_folder):
    """In a process of its own: a fork of the test process would take its other threads' locks along."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_FORK, canonical_folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # above all, nothing about tokenizers and parallelism
