"""A whole run on a CPU, small: right and wrong backends, one that can't load, one that dies at its turn, a peer."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilm import MiniLMConfig
from minilm.bench import measure
from minilm.bench.contestant import Contestant
from minilm.bench.engines import Choice
from minilm.bench.measure import run, run_profile
from minilm.bench.processes import WorkerError
from minilm.bench.report import profile_table, table
from minilm.bench.results import _describe_engine, _results
from minilm.bench.settings import Settings
from minilm.bench.workloads import Workload

TOYS = """
import os, sys, traceback
from minilm.kernels.torch_backend import TorchBackend

class Wrong(TorchBackend):
    def gelu(self, x):
        return super().gelu(x) * 1.01

class NotANumber(TorchBackend):
    def attention(self, *args):
        return super().attention(*args) * float("nan")

class Raises(TorchBackend):
    def gelu(self, x):
        raise RuntimeError("no gelu today")

class DiesAtItsTurn(TorchBackend):
    def linear(self, x, weights):
        if any(frame.name == "measure" for frame in traceback.extract_stack()):
            print("enough of this", file=sys.stderr, flush=True)
            os._exit(5)
        return super().linear(x, weights)
"""
NAMES = ("torch", "Wrong", "NotANumber", "Raises", "DiesAtItsTurn")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toys") / "toys.py"
    path.write_text(TOYS)
    return path


def surroundings():
    """Return what a run has no business to change."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    started = children.read_text() if children.exists() else ""
    return dict(os.environ), torch.get_num_threads(), started, Path.cwd()


@pytest.fixture(scope="module")
def ran(canonical_folder, toys):
    """Return the report, what was told on the way, and the surroundings before and after."""
    before, told = surroundings(), []
    settings = Settings(
        backends=("torch", *(f"{toys}:{name}" for name in NAMES[1:])),
        peers=("padded-attention", "flash-attention"),
        workloads=("attention-16-48", "text-short-2", "tokens-16-64", "tokens-600-600"),
        device="cpu",
        model=str(canonical_folder),
        threads=(1,),
        seconds=1,
    )
    report = run(settings, told.append)
    for engine in report["engines"]:
        engine["name"] = engine["name"].rpartition(":")[2]
    for result in report["results"]:
        result["engine"] = result["engine"].rpartition(":")[2]
    return report, told, (before, surroundings())


def test_engines_fare_as_they_should(ran):
    engines = {engine["name"]: engine for engine in ran[0]["engines"]}
    statuses = ["ok", "wrong", "wrong", "failed", "failed", "ok", "failed"]
    assert {name: engine["status"] for name, engine in engines.items()} == dict(
        zip((*NAMES, "padded-attention", "flash-attention"), statuses, strict=True)
    )
    assert engines["Raises"]["error"] == "RuntimeError: no gelu today"
    assert engines["DiesAtItsTurn"]["error"] == "the process ended with exit code 5: enough of this"
    assert engines["flash-attention"]["error"] == "EngineError: flash-attention runs only on cuda"
    assert engines["torch"]["min_cosine"] > 1 - 1e-9
    assert 0.99 < engines["Wrong"]["min_cosine"] < 0.99999
    assert engines["NotANumber"]["min_cosine"] is None
    assert engines["torch"]["threads"] == 1
    assert engines["torch"]["peak_memory"] > 1e8
    assert 0 < engines["torch"]["import_seconds"] < engines["torch"]["first_vector_seconds"]


def test_results_are_consistent(ran):
    report = ran[0]
    workloads = {workload["name"]: workload for workload in report["workloads"]}
    timed = {(r["workload"], r["engine"]): r for r in report["results"] if "seconds" in r}
    expected = {(name, engine) for name in workloads for engine in NAMES[:3]}
    assert set(timed) == expected | {("attention-16-48", "padded-attention"), ("attention-16-48", "DiesAtItsTurn")}
    best = max(c["median"] for c in report["ceilings"].values())
    for (name, _), result in timed.items():
        seconds = result["seconds"]
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert len(result["samples"]) == seconds["rounds"] >= 1
        assert result["tokens_per_second"] == pytest.approx(workloads[name]["tokens"] / seconds["median"])
        assert result["flops_per_second"] == pytest.approx(workloads[name]["flops"] / seconds["median"])
        assert result["fraction_of_peak"] == pytest.approx(result["flops_per_second"] / best)
    assert timed["tokens-16-64", "torch"]["faithful"] is True
    assert timed["tokens-16-64", "Wrong"]["faithful"] is False
    assert timed["attention-16-48", "padded-attention"]["faithful"] is True


def test_the_report_says_what_was_measured_where(ran):
    report = ran[0]
    assert report["refused"] == {"tokens-600-600": "the model takes at most 512 tokens"}
    assert report["machine"]["device"] == "cpu"
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["settings"]["workloads"] == ("attention-16-48", "text-short-2", "tokens-16-64", "tokens-600-600")
    assert len(report["model"]["fingerprint"]) == 64
    json.dumps(report, allow_nan=False)
    assert "DiesAtItsTurn: the process ended with exit code 5" in table(report)


def test_progress_is_told(ran):
    told = "\n".join(ran[1])
    assert "loading torch" in told
    assert "round 1 took" in told


def test_the_process_is_left_as_it_was(ran):
    before, after = ran[2]
    assert after == before


def test_profile(canonical_folder):
    settings = Settings(
        backends=("torch",), device="cpu", model=str(canonical_folder), workloads=("text-short-2",), seconds=0.1
    )
    report = run_profile(settings)
    (workload,) = report["workloads"]
    assert workload["name"] == "text-short-2"
    assert "  linear" in profile_table(report)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match=r"nothing can be measured: .*nowhere"):
        run(Settings(backends=("torch",), peers=(), device="cpu", model="./nowhere"))


class FakeWorker:
    """Answers as a worker would, at once, and notes what it was asked for."""

    asked: list = []  # noqa: RUF012 - one list for all

    def __init__(self, name, *_):
        self.name, self.started = name, 0.0

    def send(self, do, **request):
        self.asked.append((self.name, do, request.get("name")))
        self.answer = {
            "load": {"workloads": ["a", "b"], "facts": {}},
            "prepare": {"ready": {name: {"seconds": 0.1} for name in request.get("names", ())}, "failed": {}},
            "measure": {"seconds": 0.1, "calls": 1},
        }.get(do)

    def receive(self, patience):
        assert patience > 0
        return {**self.answer, "arrived": 1.0}

    def close(self, grace=0):
        pass


def test_engines_take_turns_in_another_order_each_round(monkeypatch):
    FakeWorker.asked.clear()
    contestants = []
    for name in ("machine", "x", "y", "z"):
        contestant = Contestant(SimpleNamespace(role="peer", label=name), FakeWorker(name))
        contestant.ready = {"m": {"seconds": 0.1}} if name == "machine" else {"a": {"seconds": 0.1}}
        contestants.append(contestant)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 4)
    settings = SimpleNamespace(seconds=1e9, device="cpu")
    measure._rounds(contestants, [SimpleNamespace(name="a")], settings, 0.0, lambda _: None)
    turns = "".join(name[0] for name, *_ in FakeWorker.asked)
    assert turns == "mxyz" + "myzx" + "mzxy" + "mxyz"
    assert all(len(contestant.samples["a"]) == 4 for contestant in contestants[1:])


def test_a_workload_that_fails_at_its_turn_is_left_and_the_others_go_on():
    class Failing(FakeWorker):
        def receive(self, _):
            if self.asked[-1][2] == "a":
                raise WorkerError("OutOfMemoryError: a", "a\nb")
            return {"seconds": 0.1, "calls": 1, "arrived": 1.0}

    engine = Contestant(SimpleNamespace(role="peer", label="x"), Failing("x"))
    engine.ready = {"a": {"seconds": 0.1}, "b": {"seconds": 0.1}}
    for name in ("a", "b"):
        measure._take_turn(engine, name, 0.1)
    assert (engine.error, engine.failed) == (None, {"a": "OutOfMemoryError: a"})
    assert list(engine.ready) == list(engine.samples) == ["b"]


def test_a_round_that_would_not_fit_is_not_begun(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    engine = Contestant(SimpleNamespace(role="peer", label="x"), FakeWorker("x"))
    engine.ready = {"a": {"seconds": 0.1}}
    machine = Contestant(SimpleNamespace(role="machine", label="m"), FakeWorker("m"))

    def take_turn(contestant, name, _):
        now[0] += 10.0
        contestant.samples.setdefault(name, []).append(1.0)

    monkeypatch.setattr(measure, "_take_turn", take_turn)
    settings = SimpleNamespace(seconds=35.0, device="cpu")
    measure._rounds([machine, engine], [SimpleNamespace(name="a")], settings, 0.0, lambda _: None)
    assert len(engine.samples["a"]) == 3


@pytest.mark.parametrize(
    ("role", "promise", "asked", "status"),
    [
        ("backend", None, None, "wrong"),
        ("backend", 0.97, None, "ok"),
        ("backend", 0.97, 0.99, "wrong"),
        ("peer", None, 0.9, "wrong"),
        ("peer", 0.97, 0.99, "ok"),
    ],
)
def test_an_engine_is_held_to_its_promise_and_a_backend_to_what_is_asked(role, promise, asked, status):
    """Its smallest cosine is 0.98."""
    choice = Choice("own", role, "own", "float32", "cpu", "")
    ready = {"a": {"min_cosine": 0.98, "max_error": 0.2, "seconds": 0.1}}
    contestant = Contestant(choice, FakeWorker("own"), {"precision": "int8", "min_cosine": promise}, ready)
    described = _describe_engine(contestant, Settings(device="cpu", min_cosine=asked))
    assert (described["status"], described["precision"]) == (status, "int8")


def test_an_engine_is_held_against_the_peak_of_its_precision():
    workload, sizes = Workload("tokens-16-16", "tokens", "", (16,)), MiniLMConfig()
    ready = {workload.name: {"min_cosine": 1.0, "max_error": 0.0}}
    engine = Contestant(Choice("own", "backend", "own", "float32", "cpu", ""), FakeWorker("own"), ready=ready)
    engine.samples = {workload.name: [2.0]}
    ceilings = {name: {"unit": "FLOP/s", "dtype": name, "median": rate} for name, rate in (("float32", 1), ("int8", 4))}
    for precision, peak in (("float32", 1), ("int8", 4)):
        engine.loaded = {"precision": precision}
        (result,) = _results([engine], [workload], sizes, ceilings, Settings(device="cpu"))
        assert result["fraction_of_peak"] == pytest.approx(workload.flops(sizes) / 2 / peak)


def test_the_machine_shows_the_ceilings_of_the_precisions_that_are_used():
    FakeWorker.asked.clear()
    prepared = []

    class Noting(FakeWorker):
        def send(self, do, **request):
            prepared.append((self.name, request.get("names")))
            super().send(do, **request)

    ceilings = {name: {"dtype": name.strip("0123456789")} for name in ("a1", "a2", "b1", "1")}
    machine = Contestant(Choice("m", "machine", "m", "", "cpu", ""), Noting("m"))
    machine.loaded = {"workloads": list(ceilings), "facts": ceilings, "precision": ""}
    engine = Contestant(Choice("x", "peer", "x", "", "cpu", ""), Noting("x"), {"workloads": ["w"], "precision": "a"})
    measure._prepare([machine, engine], Settings(device="cpu"), [SimpleNamespace(name="w", priority=0)], lambda _: None)
    assert prepared == [("m", ["a1", "a2", "1"]), ("x", ["w"])]


def test_sts_is_asked_of_those_that_encode_texts_when_all_is_timed():
    FakeWorker.asked.clear()

    class Scoring(FakeWorker):
        def receive(self, _):
            answers = {
                "finish": {"peak_memory": 1, "extras": {}},
                "sts": {"average": 78.9, "tasks": {"stsb": 82.0}},
            }
            return {**answers[self.asked[-1][1]], "arrived": 1.0}

    text, tokens = Workload("t", "texts", ""), Workload("tokens-16-64", "tokens", "", (16,))
    engines = [
        Contestant(Choice(name, "peer", name, "", "cpu", ""), Scoring(name), ready={ready: {}})
        for name, ready in (("x", "t"), ("y", "tokens-16-64"))
    ]
    measure._finish(engines, [text, tokens], Settings(device="cpu", sts=True, data="d"), lambda _: None)
    assert [name[:2] for name in FakeWorker.asked] == [("x", "finish"), ("x", "sts"), ("y", "finish")]
    assert [engine.sts for engine in engines] == [{"average": 78.9, "tasks": {"stsb": 82.0}}, {}]


def test_a_backend_that_fails_the_parity_suite_is_wrong():
    rows = [{"operation": "gelu", "ok": False}, {"operation": "linear", "ok": True}]

    class Checked(FakeWorker):
        def receive(self, _):
            assert self.asked[-1][1] == "parity"
            return {"rows": rows, "arrived": 1.0}

    choices = [Choice(name, role, name, "float32", "cpu", "") for name, role in (("p", "peer"), ("own", "backend"))]
    peer, own = (Contestant(choice, Checked(choice.label), ready={"a": {"seconds": 0.1}}) for choice in choices)
    measure._check([peer, own], lambda _: None)
    described = [_describe_engine(contestant, Settings(device="cpu")) for contestant in (peer, own)]
    assert [engine["status"] for engine in described] == ["ok", "wrong"]
    assert described[1]["error"] == "parity: 1 of 2 checks beyond their limits, first gelu"
    assert described[1]["parity"] == rows
