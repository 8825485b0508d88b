"""Which engines there are, and when one agrees with the reference."""

import numpy as np
import pytest
import torch

from minilm.bench.engines import FAITHFUL, Choice, EngineError, agreement, is_faithful, make_engine
from minilm.bench.peers import PEERS
from minilm.bench.settings import Settings


@pytest.fixture
def truth(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "truth.npy", rows)
    return rows, tmp_path / "truth.npy"


def test_agreement_of_equal_rows(truth):
    rows, path = truth
    for result in (rows, torch.from_numpy(rows), list(rows), np.concatenate([rows, rows]), rows.reshape(5, 2, 4)):
        assert agreement(result, path) == pytest.approx({"min_cosine": 1, "max_error": 0})


def test_agreement_is_that_of_the_worst_row(truth):
    rows, path = truth
    turned = rows.copy()
    turned[3] = np.roll(turned[3], 1)
    found = agreement(turned, path)
    assert found["min_cosine"] == pytest.approx(float(turned[3] @ rows[3]))
    assert found["max_error"] == pytest.approx(np.sqrt(2 - 2 * found["min_cosine"]))


def test_without_a_reference_nothing_is_compared(tmp_path):
    assert agreement(np.ones(3), tmp_path / "none.npy") == {}


@pytest.mark.parametrize("change", ["a NaN", "rows missing", "columns missing", "scaled", "zero"])
def test_what_differs_is_not_faithful(truth, change):
    rows, path = truth
    changed = {
        "a NaN": np.where(np.arange(5)[:, None] == 2, np.nan, rows),
        "rows missing": rows[:4],
        "columns missing": rows[:, :7],
        "scaled": rows * 1.1,  # whose cosines are 1
        "zero": rows * 0,
    }[change]
    assert not is_faithful(agreement(changed, path), "bfloat16", None)


@pytest.mark.parametrize("dtype", FAITHFUL)
def test_rounding_is_faithful_and_ten_times_the_limit_is_not(truth, dtype):
    rows, path = truth
    rounded = torch.from_numpy(rows).to(getattr(torch, dtype))
    assert is_faithful(agreement(rounded, path), dtype, None)
    for factor, expected in ((0.5, True), (10, False)):
        angle = np.arccos(1 - factor * FAITHFUL[dtype])
        across = np.roll(rows, 1, axis=1)
        across -= (across * rows).sum(axis=1, keepdims=True) * rows
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        turned = rows.astype(np.float64) * np.cos(angle) + across * np.sin(angle)
        assert is_faithful(agreement(turned, path), dtype, None) is expected


def test_the_limit_can_be_set(truth):
    rows, path = truth
    facts = agreement(rows + 0.01, path)
    assert not is_faithful(facts, "float32", None)
    assert is_faithful(facts, "float32", 0.99)
    assert not is_faithful(facts, "float32", 1.0)


def test_usual_choices_by_device():
    cpu, gpu = Settings().on("cpu"), Settings().on("cuda:1")
    assert (cpu.backends, cpu.dtype) == (("auto",), "float32")
    assert (gpu.backends, gpu.dtype) == (("triton", "torch"), "float16")
    assert {"sentence-transformers", "onnxruntime", "openvino", "fastembed"} < set(cpu.peers)
    assert {"sentence-transformers", "transformers-compiled", "flash-attention"} < set(gpu.peers)
    assert all(kind in PEERS[name].devices for kind, each in (("cpu", cpu), ("cuda", gpu)) for name in each.peers)
    assert {name.split("-")[0] for name in cpu.workloads} == {"text"}
    assert {name.split("-")[0] for name in gpu.workloads} == {"text", "tokens", "attention"}
    assert all(choice.device == "cuda:1" for choice in gpu.choices("scratch"))


def test_on_a_cpu_all_engines_have_as_many_threads():
    assert {choice.threads for choice in Settings().on("cpu", 6).choices("")} == {6}
    assert {choice.threads for choice in Settings(threads=(2,)).on("cpu", 6).choices("")} == {2}
    assert {choice.threads for choice in Settings().on("cuda", 6).choices("")} == {None}


def test_engines_by_dtype_and_thread_count():
    settings = Settings(backends=("torch@bfloat16", "own.py:Own"), peers=(), threads=(1, 2)).on("cpu")
    found = [(c.label, c.name, c.dtype, c.threads) for c in settings.choices("scratch")]
    assert found == [
        ("torch@bfloat16, 1 thread", "torch", "bfloat16", 1),
        ("torch@bfloat16, 2 threads", "torch", "bfloat16", 2),
        ("own.py:Own, 1 thread", "own.py:Own", "float32", 1),
        ("own.py:Own, 2 threads", "own.py:Own", "float32", 2),
    ]
    assert [c.label for c in Settings(backends=("torch",), peers=(), threads=(2,)).on("cpu").choices("")] == ["torch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("sentence-transformer",)}, "unknown peer sentence-transformer; known: sentence-transformers"),
        ({"backends": ("torch@int3",)}, "DTYPE one of float32"),
        ({"backends": ("",)}, "expected an engine"),
        ({"dtype": "half", "backends": ("torch",)}, "DTYPE one of"),
        ({"workloads": ("text-short",)}, "unknown workload 'text-short'"),
        ({"threads": (0,)}, "must be positive"),
        ({"seconds": 0.0}, "must be positive"),
        ({"sts": True}, "sts needs data"),
    ],
)
def test_settings_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_settings_that_can_not_be_on_this_device():
    with pytest.raises(ValueError, match="no engine to measure"):
        Settings(backends=(), peers=()).on("cpu")
    with pytest.raises(ValueError, match=r"one of the engines, auto, sentence-transformers, .*; got 'triton'"):
        Settings(baseline="triton").on("cpu")


def test_a_peer_says_what_it_computes_in():
    with pytest.raises(EngineError, match="openvino computes in float32 or bfloat16 or float16, not in float64"):
        make_engine(Choice("o", "peer", "openvino", "float64", "cpu", ""))


@pytest.mark.parametrize("name", ["varlen-attention", "flash-attention"])
def test_a_peer_says_where_it_runs(name):
    with pytest.raises(EngineError, match=f"{name} runs only on cuda"):
        make_engine(Choice(name, "peer", name, "float16", "cpu", ""))
