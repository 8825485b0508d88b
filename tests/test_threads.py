"""Threads and forks: results as alone, and the process as it was."""

import os
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_in_a_thread_of_its_own():
    parent = threading.get_ident()
    assert threads.run(threading.get_ident) == parent
    pid = os.fork()
    if pid == 0:
        os._exit(0 if threads.run(threading.get_ident) != threading.get_ident() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
