"""Tables: every figure where it belongs, in digits that a person reads."""

import copy
import json
import re

import pytest

from minilm.bench.report import align, choose_baseline, digits, profile_table, rate, seconds, size, table


def row(text: str, first: str) -> list[str]:
    """Return the cells of the only line whose first cell is this."""
    (found,) = [cells for line in text.splitlines() if (cells := re.split(" {2,}", line))[0] == first]
    return [cell for cell in found if cell]


def block(text: str, first: str) -> str:
    """Return the part of a report that starts so."""
    (part,) = [part for part in text.split("\n\n") if part.startswith(first)]
    return part


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.0000123,), "12.3 µs"), ((0.001,), "1.00 ms"), ((1.5,), "1.50 s"), ((0.0099, 0.0101), "9.90-10.1 ms")],
)
def test_seconds(values, expected):
    assert seconds(*values) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.123, "0.12"), (9.99, "9.99"), (9.996, "10.0"), (99.96, "100")])
def test_digits(value, expected):
    assert digits(value) == expected


def test_rates_and_sizes():
    assert rate(7.88e14, "FLOP/s") == "788 TFLOP/s"
    assert rate(12.0, "tok/s") == "12.0 tok/s"
    assert (size(45_100_000), size(None)) == ("45 MB", "-")


def test_align():
    assert align([["name", "x"], ["a", "10"]]) == "name   x\na     10"


def times(report: dict, workload: str) -> dict[str, float]:
    """Return every engine's median seconds."""
    return {r["engine"]: r["seconds"]["median"] for r in report["results"] if r["workload"] == workload}


def test_speeds_are_relative_to_the_baseline_and_to_the_best_peer_of_the_precision(cpu_report):
    text = table(cpu_report, "sentence-transformers")
    found = times(cpu_report, "text-mixed-192")
    base, own, int8 = (found[name] for name in ("sentence-transformers", "packed", "int8.py:Int8"))
    best = min(found[name] for name in ("sentence-transformers", "onnxruntime", "openvino", "fastembed"))
    summary = block(text, "                  ")
    speeds, ratios = summary.split("over the fastest peer (*) in its precision")
    assert row(speeds, "speed, sentence-transformers = 1")[-2:] == ["512 tokens", "cosine"]
    for name, taken in found.items():
        assert row(speeds, name)[5].rstrip("*") == f"{base / taken:.2f}x"
    assert row(ratios, "packed")[5] == f"{best / own:.2f}x"
    assert row(ratios, "int8.py:Int8")[1:6:4] == ["int8", f"{found['onnxruntime-int8'] / int8:.2f}x"]
    details = row(block(text, "192 texts of mixed length ("), "packed")
    assert details[6:8] == [f"{base / own:.2f}x", f"{best / own:.2f}x"]


def test_the_best_peer_of_each_precision_is_marked(cpu_report):
    summary = block(table(cpu_report), "                  ").split("over the fastest")[0]
    marked = {line.split()[0] for line in summary.splitlines() if "*" in line}
    found = times(cpu_report, "text-128-96")
    exact = min(("sentence-transformers", "onnxruntime", "openvino", "fastembed"), key=found.get)
    assert {exact, "onnxruntime-int8", "openvino@bfloat16"} <= marked
    assert row(summary, exact)[6].endswith("*")
    assert not marked & {"packed", "torch", "int8.py:Int8"}


def test_every_backend_and_peer_has_its_accuracy_beside_its_speed(cpu_report):
    text = table(cpu_report)
    lines = block(text, "1 short sentence (").splitlines()
    assert lines[1].split("  ")[-1].strip() == "min cosine"
    assert [line.split()[-1] for line in lines[2:]] == ["0.9999999"] * 10
    assert "STS" not in text


def test_sts_averages_stand_beside_the_cosines(cpu_report):
    report = copy.deepcopy(cpu_report)
    report["engines"][0]["sts"] = {"average": 78.874, "tasks": {}}
    speeds = block(table(report), "                  ").split("over the fastest")[0]
    assert row(speeds, "packed")[-2:] == ["0.9999999", "78.87"]
    assert row(speeds, "torch")[-1] == "-"


def test_token_workloads_are_a_matrix(gpu_report):
    text = table(gpu_report)
    matrix = block(text, "model alone, Mtok/s")
    rates = {r["engine"]: r["tokens_per_second"] for r in gpu_report["results"] if r["workload"] == "tokens-128-64k"}
    cells = row(matrix, "64k tokens in sequences of 128")
    assert cells[1:6] == [digits(value / 1e6) for value in rates.values()]
    assert cells[6].endswith("%")
    assert "attention alone, Mtok/s" in text
    assert row(block(text, "one call"), "1 sequence of 32 tokens: triton")[1] == "32"


def test_ceilings_and_peak(gpu_report):
    heading = table(gpu_report).split("\n\n")[0]
    assert "NVIDIA H100" in heading
    assert "782 TFLOP/s  matrix product, large float16" in heading
    assert "small" not in heading
    assert "3.00 TB/s  copy of 1024 MiB" in heading


def test_what_is_wrong_or_failed_is_said(cpu_report):
    report = copy.deepcopy(cpu_report)
    packed, int8 = (e for e in report["engines"] if e["name"] in ("packed", "int8.py:Int8"))
    packed |= {"status": "wrong", "min_cosine": None}
    int8 |= {"status": "failed", "error": "the process was killed by SIGSEGV"}
    results = [r for r in report["results"] if r["engine"] != int8["name"]]
    first = next(r for r in results if r["engine"] == "packed")
    first |= {"faithful": False, "min_cosine": None}
    results.append({"workload": "text-512-32", "engine": "openvino", "error": "MemoryError"})
    report |= {"results": results, "refused": {"text-600-1": "the model takes at most 512 tokens"}}
    text = table(report)
    assert "NaN WRONG" in text
    assert row(block(text, "engine "), "packed")[1] == "wrong"
    problems = block(text, "not measured")
    assert "int8.py:Int8: the process was killed by SIGSEGV" in problems
    assert "openvino, text-512-32: MemoryError" in problems
    assert "text-600-1: the model takes at most 512" in problems


def test_nothing_measured_at_all_is_still_a_report(cpu_report):
    report = copy.deepcopy(cpu_report) | {"results": [], "ceilings": {}}
    assert "not measured" in table(report)


def test_thread_scaling(cpu_report):
    report = copy.deepcopy(cpu_report)
    report["settings"]["threads"] = [1, 2]
    workload, engine, timed = report["workloads"][0], report["engines"][0], report["results"][0]
    times = {"packed, 1 thread": 3.0, "packed, 2 threads": 1.5, "peer, 1 thread": 4.0, "peer, 2 threads": 1.0}
    report["engines"] = [
        {**engine, "name": name, "role": "peer" if "peer" in name else "backend", "threads": 1 if "1" in name else 2}
        for name in times
    ]
    report["results"] = [
        {**timed, "engine": name, "seconds": {"median": t, "p10": t, "p90": t, "rounds": 1}}
        for name, t in times.items()
    ]
    text = table(report)
    scaling = block(text, "speed by threads")
    assert row(scaling, f"{workload['title']}: packed")[1:] == ["1.00x", "2.00x"]
    ratios = text.split("over the fastest peer")[1].split("\n\n")[0]
    assert row(ratios, "packed, 1 thread")[2] == "1.33x", "each beside those with as many threads"
    assert row(ratios, "packed, 2 threads")[2] == "0.67x"


def test_baseline(cpu_report):
    assert choose_baseline(cpu_report) == "packed"
    assert choose_baseline(cpu_report, "torch") == "torch"
    assert choose_baseline(cpu_report | {"settings": {"baseline": "openvino"}}) == "openvino"
    with pytest.raises(ValueError, match=r"must be one of the engines, packed, .*; got 'x'"):
        choose_baseline(cpu_report, "x")


def test_a_report_survives_json(gpu_report):
    assert table(json.loads(json.dumps(gpu_report, allow_nan=False))) == table(gpu_report)


def test_profile_table():
    parts = [("linear", 24.0, 0.06), ("other", 1, 0.04)]
    report = {
        "engine": "torch",
        "machine": {"processor": "P"},
        "workloads": [{"name": "n", "title": "1 short sentence", "seconds": 0.1, "parts": parts}],
    }
    lines = profile_table(report).splitlines()
    assert lines[0] == "torch on P"
    assert lines[2].split() == ["1", "short", "sentence,", "100", "ms", "calls", "time", "share"]
    assert lines[3].split() == ["linear", "24.0", "60.0", "ms", "60.0%"]
    assert len(lines) == 5
    report["workloads"][0]["operators"] = [("aten::addmm", 24, 0.03), ("no operator of torch", 1, 0.09)]
    lines = profile_table(report).splitlines()
    assert lines[5].startswith("the same, by torch's operators")
    assert lines[6].split() == ["aten::addmm", "24.0", "30.0", "ms", "25.0%"]


def test_parity_has_a_column_where_it_was_checked(cpu_report):
    assert "parity" not in table(cpu_report)
    report = copy.deepcopy(cpu_report)
    report["engines"][0]["parity"] = [{"ok": True}, {"ok": False}]
    assert row(block(table(report), "engine "), "packed")[-1] == "1 of 2"
