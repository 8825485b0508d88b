"""Reports as a run would return them, made up: of a CPU with texts, of a GPU with everything."""

import random

import pytest

from minilm import MiniLMConfig
from minilm.bench import workloads as bench_workloads
from minilm.bench.reference import build as build_reference
from minilm.bench.timing import quantiles
from minilm.bench.workloads import Workload
from minilm.quantization import calibration_sentences


def count_words(text: str) -> int:
    """As a tokenizer whose tokens are words would count, two special ones included."""
    return len(text.split()) + 2


@pytest.fixture
def texts(own_sentences) -> bench_workloads.Texts:
    return bench_workloads.Texts(own_sentences, count_words)


def made_up(device: str, machine: dict, engines: list[tuple[str, str, float, tuple[str, ...]]], peak: float) -> dict:
    """Return a report in which each engine (name, role, share of the peak, kinds) is about that fast everywhere.

    An engine whose name has `int8` in it computes in that; `@bfloat16` says so.
    """
    generator, config = random.Random(0), MiniLMConfig()
    dtype, width = ("float16", 2) if device == "cuda" else ("float32", 4)
    names = bench_workloads.choose(("texts", "tokens", "attention") if device == "cuda" else ("texts",), device)
    workloads, refused = bench_workloads.build(names, bench_workloads.Texts(calibration_sentences(), count_words), 512)
    results = []
    for workload in workloads:
        for name, role, share, kinds in engines:
            if workload.kind not in kinds:
                continue
            best = min(peak, 4e12 * workload.flops(config) / workload.least_bytes(config, width))
            longest = max(workload.lengths)
            padding = workload.num_tokens / (longest * len(workload.lengths)) if role == "peer" else 1
            overhead = 1e-4 if device == "cuda" else 1e-3
            seconds = workload.flops(config) / (best * share * padding) + overhead / share
            samples = [seconds * generator.uniform(0.95, 1.15) for _ in range(7)]
            results.append(result(workload, name, role, samples, peak, config, width))
    return {
        "minilm": "0.1.0",
        "date": "2026-01-31T12:00:00+00:00",
        "seconds": 123.0,
        "machine": {"device": device, "threads": 2, "processor": "Some Processor", **machine},
        "versions": {"torch": "2.13.0"},
        "settings": {"threads": []},
        "model": {"source": "all-MiniLM-L6-v2"},
        "workloads": [
            {
                "name": w.name,
                "kind": w.kind,
                "title": w.title,
                "sequences": len(w.lengths),
                "tokens": w.num_tokens,
                "longest": max(w.lengths),
                "flops": w.flops(config),
            }
            for w in workloads
        ],
        "refused": refused,
        "ceilings": {
            f"matrix product, {shape} {dtype}": {"unit": "FLOP/s", "dtype": dtype, **quantiles([rate, rate * 0.98])}
            for shape, rate in (("small", 0.5 * peak), ("large", peak))
        },
        "ceilings_error": None,
        "engines": [
            {
                "name": name,
                "role": role,
                "dtype": name.partition("@")[2] or dtype,
                "precision": "int8" if "int8" in name else name.partition("@")[2] or dtype,
                "status": "ok",
                "error": None,
                "threads": 2,
                "min_cosine": 0.9999999,
                "sts": {},
                "parity": [],
                "peak_memory": 500_000_000,
                "import_seconds": 1.5,
                "load_seconds": 0.3,
                "first_vector_seconds": 2.1,
                "facts": {},
            }
            for name, role, _, _ in engines
        ],
        "results": results,
    }


def result(workload: Workload, name: str, role: str, samples: list[float], peak: float, config, width: int) -> dict:
    seconds = quantiles(samples)
    rate = workload.flops(config) / seconds["median"]
    made = {
        "workload": workload.name,
        "engine": name,
        "seconds": seconds,
        "samples": samples,
        "tokens_per_second": workload.num_tokens / seconds["median"],
        "flops_per_second": rate,
        "fraction_of_peak": rate / peak,
        "flops_per_byte": workload.flops(config) / workload.least_bytes(config, width),
        "faithful": True,
        "min_cosine": 0.9999999,
        "max_error": 1e-4,
    }
    if len(workload.lengths) == 1 and workload.kind == "tokens" and role == "backend":
        latency = {f"{kind}_latency": quantiles(samples) for kind in ("host", "device", "graph")}
        made |= {"launches": 32, **latency}
    return made


@pytest.fixture(scope="session")
def cpu_report() -> dict:
    everything = ("texts", "tokens", "attention")
    engines = [
        ("packed", "backend", 0.85, everything),
        ("packed@bfloat16", "backend", 4.0, everything),
        ("int8.py:Int8", "backend", 1.5, everything),
        ("torch", "backend", 0.7, everything),
        ("sentence-transformers", "peer", 0.6, ("texts",)),
        ("onnxruntime", "peer", 0.65, ("texts",)),
        ("onnxruntime-int8", "peer", 1.3, ("texts",)),
        ("openvino", "peer", 0.63, ("texts",)),
        ("openvino@bfloat16", "peer", 3.5, ("texts",)),
        ("fastembed", "peer", 0.5, ("texts",)),
    ]
    return made_up("cpu", {}, engines, 1.6e11)


@pytest.fixture(scope="session")
def gpu_report() -> dict:
    engines = [
        ("triton", "backend", 0.5, ("texts", "tokens", "attention")),
        ("torch", "backend", 0.2, ("texts", "tokens", "attention")),
        ("sentence-transformers", "peer", 0.02, ("texts",)),
        ("transformers", "peer", 0.25, ("tokens",)),
        ("transformers-sorted", "peer", 0.3, ("tokens",)),
        ("transformers-compiled", "peer", 0.38, ("tokens",)),
        ("padded-attention", "peer", 0.2, ("attention",)),
        ("varlen-attention", "peer", 0.24, ("attention",)),
    ]
    report = made_up("cuda", {"gpu": "NVIDIA H100 80GB HBM3"}, engines, 7.9e14)
    report["ceilings"] |= {
        "copy of 1024 MiB": {"unit": "B/s", "dtype": "", **quantiles([3.0e12])},
        "L2 cache, 15 MiB": {"unit": "B/s", "dtype": "", **quantiles([5.5e12])},
    }
    return report


WORKLOADS = ("text-short-2", "text-mixed-6", "tokens-16-64", "tokens-mixed-96", "attention-16-48", "attention-mixed-64")


@pytest.fixture(scope="session")
def scratch(canonical_folder, tmp_path_factory):
    """A folder as workers share it: small workloads, the reference's rows, and the weights as peers read them."""
    folder = tmp_path_factory.mktemp("scratch")
    built = build_reference(str(canonical_folder), None, [*WORKLOADS, "tokens-600-600"], str(folder))
    assert list(built["refused"]) == ["tokens-600-600"]
    return folder
