"""Pictures: what is drawn, by looking at the axes; that nothing lies upon anything else was looked at by eye."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest

from minilm.bench.plots import plot


@pytest.fixture
def drawn(saved_figures):
    """Return a function that plots a report and returns its axes by title, having checked the PNG."""

    def draw(report, baseline=None):
        file = io.BytesIO()
        plot(report, file, baseline)
        assert file.getvalue().startswith(b"\x89PNG")
        return {axes.get_title(loc="left"): axes for axes in saved_figures[-1].axes}

    return draw


PEERS = (
    ("sentence-transformers", "onnxruntime", "openvino", "fastembed"),
    ("openvino@bfloat16",),
    ("onnxruntime-int8",),
)


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def points(axes) -> list[tuple[float, float]]:
    """Return the places of the marks, from left to right and down."""
    return [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]


def test_marks_are_speeds_relative_to_the_baseline_by_precision(drawn, cpu_report):
    axes = list(drawn(cpu_report, "sentence-transformers").values())
    times = {(r["workload"], r["engine"]): r["seconds"]["median"] for r in cpu_report["results"]}
    engines = sorted(cpu_report["engines"], key=lambda e: ("float32", "bfloat16", "int8").index(e["precision"]))
    names = [engine["name"] for engine in engines]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == names
    for each, workload in zip(axes, (workload["name"] for workload in cpu_report["workloads"]), strict=True):
        expected = [times[workload, "sentence-transformers"] / times[workload, name] for name in names]
        assert [x for x, _ in points(each)] == pytest.approx(expected)
        best = [min(times[workload, name] for name in peers) for peers in PEERS]
        lines = [lines for lines in each.collections if lines.get_linestyle()[0][1]]
        drawn_best = [line.get_segments()[0][0][0] for line in lines]
        assert drawn_best == pytest.approx([times[workload, "sentence-transformers"] / taken for taken in best])


def test_gpu_has_a_roofline_and_speed_by_length(drawn, gpu_report):
    axes = drawn(gpu_report)
    names = [
        "Roofline: the model alone, every length and batch size",
        "The model alone: batches of 64k tokens",
        "Attention alone: batches of 64k tokens",
    ]
    assert list(axes)[:3] == names
    assert [title.partition("  (")[0] for title in list(axes)[3:]] == [
        "1 short sentence",
        "256 short sentences",
        "4,096 texts of mixed length",
        "1,024 texts of 128 tokens",
    ]
    roofline, by_length, attention, *_ = axes.values()
    notes = [text.get_text() for text in roofline.texts]
    assert any("782 TFLOP/s" in note for note in notes)
    assert sum("TB/s" in note for note in notes) == 2
    assert all(text.get_rotation() > 20 for text in roofline.texts if "TB/s" in text.get_text())
    assert [label.get_text() for label in by_length.get_xticklabels()] == [
        "16",
        "32",
        "64",
        "128",
        "256",
        "512",
        "mixed",
    ]
    assert legend(by_length)[:2] == ["triton", "torch"]
    assert legend(attention) == ["triton", "torch", "padded-attention", "varlen-attention"]


def test_roofline_points_are_the_results(drawn, gpu_report):
    roofline = drawn(gpu_report)["Roofline: the model alone, every length and batch size"]
    (points,) = [c for c in roofline.collections if c.get_label() == "triton"]
    results = [r for r in gpu_report["results"] if r["engine"] == "triton" and r["workload"].startswith("tokens")]
    drawn_points = sorted(map(tuple, points.get_offsets().tolist()))
    expected = sorted((r["flops_per_byte"], r["flops_per_second"]) for r in results)
    assert np.array(drawn_points) == pytest.approx(np.array(expected))


def test_a_wrong_backend_is_marked(drawn, cpu_report):
    report = copy.deepcopy(cpu_report)
    report["engines"][0]["status"] = "wrong"
    axes = next(iter(drawn(report).values()))
    assert axes.get_yticklabels()[0].get_text() == "packed (wrong)"


def test_holes_are_no_obstacle(drawn, gpu_report):
    """Engines without results, workloads that only one engine did, a machine without ceilings."""
    kept = {"text-short-1", "tokens-16-1k", "attention-mixed-64k"}
    results = [r for r in gpu_report["results"] if r["workload"] in kept and r["engine"] == "triton"]
    axes = drawn({**gpu_report, "results": results, "ceilings": {}})
    assert len(axes) == 4
    peer = [r for r in gpu_report["results"] if r["engine"] == "sentence-transformers"]
    (title,) = drawn({**gpu_report, "results": peer[:1]}, "triton")
    assert title.startswith("1 short sentence")
    assert title.endswith("of sentence-transformers)")


def test_nothing_to_plot(cpu_report):
    with pytest.raises(ValueError, match="nothing was measured"):
        plot(cpu_report | {"results": []}, io.BytesIO())
    with pytest.raises(ValueError, match="baseline"):
        plot(cpu_report, io.BytesIO(), "x")


def test_matplotlib_is_imported_only_to_plot_and_its_lack_is_explained(cpu_report, monkeypatch):
    code = "import sys, minilm.bench.plots, minilm.bench.measure; print({'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install \"minilm\[plots\]\""):
        plot(cpu_report, io.BytesIO())
