"""What a worker does for an engine, in this process: load, check, time, and go on where something fails."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minilm.bench import engines, gpu, worker
from minilm.bench.engines import Choice
from minilm.bench.peers import PEERS
from minilm.bench.reference import build as build_reference
from minilm.bench.timing import HostTimer
from minilm.bench.worker import Seat
from minilm.evaluate import EvaluationDataError, evaluate_sts
from minilm.evaluate.sts_data import TASKS


def seat_of(scratch, role, name, dtype="float32"):
    seat = Seat()
    return seat, seat.load(label=name, role=role, name=name, dtype=dtype, device="cpu", scratch=str(scratch))


@pytest.mark.parametrize(
    ("role", "name", "kinds"),
    [
        ("backend", "torch", {"text", "tokens", "attention"}),
        ("peer", "sentence-transformers", {"text"}),
        ("peer", "transformers", {"text", "tokens"}),
        ("peer", "transformers-sorted", {"tokens"}),
        ("peer", "padded-attention", {"attention"}),
    ],
)
def test_engines_give_the_reference_s_rows(scratch, role, name, kinds):
    seat, loaded = seat_of(scratch, role, name)
    names = loaded["workloads"]
    assert {each.split("-")[0] for each in names} == kinds
    assert all(loaded[f"{step}_seconds"] >= 0 for step in ("import", "load", "first_call"))
    answer = seat.prepare(names, 60)
    assert answer["failed"] == {}
    for each, facts in answer["ready"].items():
        assert facts["max_error"] < 1e-5, each
        assert facts["min_cosine"] > 1 - 1e-9, each
        assert facts["seconds"] > 0
    turn = seat.measure(names[0], 0.01)
    assert turn["calls"] >= 1
    assert 0 < turn["seconds"] < 10
    assert seat.finish(names)["extras"] == {}
    json.dumps([loaded, answer, turn])


def test_a_half_precision_peer_is_close(scratch):
    seat, loaded = seat_of(scratch, "peer", "transformers", "bfloat16")
    facts = seat.prepare(loaded["workloads"], 60)["ready"]["tokens-mixed-96"]
    assert 1e-4 < facts["max_error"] < 0.05


def test_sorted_batches_hold_little_padding(scratch):
    peer = PEERS["transformers-sorted"](Choice("p", "peer", "transformers-sorted", "float32", "cpu", str(scratch)))
    generator = np.random.default_rng(0)
    sequences = [[1] * int(length) for length in generator.integers(3, 512, 500)]
    batches = peer.batches(sequences)
    assert sorted(index for batch in batches for index, _ in batch) == list(range(500))
    padded = sum(len(batch) * len(batch[0][1]) for batch in batches)
    assert padded < 1.25 * sum(map(len, sequences))
    assert all(len(batch) * len(batch[0][1]) <= 32 * 1024 for batch in batches)


def test_a_compiled_peer_does_the_headline_workloads_on_a_gpu(scratch, texts):
    from minilm.bench.workloads import build

    made, _ = build(["tokens-128-64k", "tokens-128-1k", "text-short-1", "tokens-32-32"], texts, 512)
    choice = Choice("c", "peer", "transformers-compiled", "float16", "cuda", str(scratch))
    peer = PEERS["transformers-compiled"](choice)
    assert [workload.name for workload in made if peer.takes(workload)] == ["tokens-128-64k", "tokens-32-32"]


@pytest.mark.parametrize("name", ["varlen-attention", "flash-attention"])
def test_packed_attention_of_others(scratch, name, monkeypatch):
    """Theirs run on GPUs only; here, what they are called with is given to plain torch."""

    def attention(query, key, value, query_ends, key_ends, longest_query, longest_key):
        assert torch.equal(query_ends, key_ends)
        assert longest_query == longest_key == int(query_ends.diff().max())
        pieces = zip(*(x.split(query_ends.diff().tolist()) for x in (query, key, value)), strict=True)
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attend(*(x.transpose(0, 1) for x in each)).transpose(0, 1) for each in pieces])

    monkeypatch.setattr(PEERS[name], "devices", ("cpu",))
    monkeypatch.setattr(PEERS[name], "load", lambda self: setattr(self, "attention", attention))
    seat, loaded = seat_of(scratch, "peer", name)
    assert loaded["workloads"] == ["attention-16-48", "attention-mixed-64"]
    answer = seat.prepare(loaded["workloads"], 60)
    assert answer["failed"] == {}
    assert all(facts["max_error"] < 1e-5 for facts in answer["ready"].values())


class Fake(engines.Engine):
    """An engine whose calls do what the test says."""

    kinds = ("texts", "tokens")
    made: list
    called: list

    def load(self):
        self.made, self.called = [], []

    def call(self, workload, rotation):
        self.made.append((workload.name, rotation))
        if workload.name == "text-mixed-6":
            raise RuntimeError("out of\nluck")

        def call():
            self.called.append((workload.name, rotation))
            return np.zeros((2, 384))

        return call


@pytest.fixture
def fake_seat(scratch, monkeypatch):
    monkeypatch.setattr(worker, "LONG", 1e9)
    seat = Seat()
    seat.engine = Fake(Choice("fake", "peer", "fake", "float32", "cpu", str(scratch)))
    seat.engine.load()
    return seat


def test_what_fails_is_told_and_the_rest_goes_on(fake_seat):
    answer = fake_seat.prepare(["text-short-2", "text-mixed-6", "tokens-16-64"], 60)
    assert answer["failed"] == {"text-mixed-6": "RuntimeError: out of"}
    assert set(answer["ready"]) == {"text-short-2", "tokens-16-64"}
    assert answer["ready"]["text-short-2"]["min_cosine"] == 0


def test_what_is_not_ready_in_time_is_left_out(fake_seat):
    answer = fake_seat.prepare(["text-short-2", "tokens-16-64"], -1)
    assert answer == {"ready": {}, "failed": dict.fromkeys(["text-short-2", "tokens-16-64"], "not ready after -1 s")}


def test_on_a_gpu_inputs_rotate_and_launches_are_counted(fake_seat, monkeypatch):
    choice = SimpleNamespace(**{**vars(fake_seat.engine.choice), "device": "cuda"})
    monkeypatch.setattr(fake_seat.engine, "choice", choice)
    monkeypatch.setattr(worker, "make_timer", lambda *_: HostTimer())
    monkeypatch.setattr(gpu, "working_memory", lambda _: 123)
    monkeypatch.setattr(gpu, "extras", lambda _, one_sequence: {"launches": 7, "one": one_sequence})
    ready = fake_seat.prepare(["text-short-2", "tokens-16-64"], 60)["ready"]
    assert {name: facts["working_memory"] for name, facts in ready.items()} == dict.fromkeys(ready, 123)
    assert fake_seat.engine.made == [("text-short-2", 0), *(("tokens-16-64", rotation) for rotation in range(3))]
    assert set(fake_seat.engine.called) == set(fake_seat.engine.made), "compiled at the first call, which is not timed"
    extras = fake_seat.finish(["tokens-16-64"])["extras"]
    assert extras == {"tokens-16-64": {"launches": 7, "one": False}}


def test_the_reference_is_read_from_any_sentences(tmp_path):
    from minilm.bench.reference import read_sentences

    (tmp_path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "sts" / "task").mkdir(parents=True)
    (tmp_path / "sts" / "task" / "x.tsv").write_text("1.0\ta\tb\n2.0\tc\td\n", encoding="utf-8")
    assert read_sentences(str(tmp_path / "lines.txt")) == ["one", "two"]
    assert sorted(read_sentences(str(tmp_path / "sts"))) == ["a", "b", "c", "d"]
    assert len(read_sentences(None)) > 90
    with pytest.raises(OSError, match="no sentences in"):
        read_sentences(str(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        read_sentences(str(tmp_path / "nowhere"))


@pytest.fixture
def sts_data(tmp_path):
    """A folder with two pairs of sentences in each task."""
    for task in TASKS:
        (tmp_path / task).mkdir()
        pairs = "5.0\tA man is eating.\tSomeone eats.\n1.0\tA plane takes off.\tA cat sleeps.\n2.0\tRain.\tIt snows.\n"
        (tmp_path / task / "test.tsv").write_text(pairs, encoding="utf-8")
    return tmp_path


def test_sts_scores_are_those_of_the_encoder(scratch, sts_data, encoder):
    seat, _ = seat_of(scratch, "backend", "torch")
    scores = seat.sts(str(sts_data))
    expected = evaluate_sts(encoder, sts_data, show_progress_bar=False)
    assert scores["average"] == pytest.approx(expected.average)
    assert list(scores["tasks"]) == list(TASKS)
    assert scores["average"] > 0
    json.dumps(scores, allow_nan=False)


def test_sts_data_that_is_not_there_is_told_before_anything_is_measured(canonical_folder, tmp_path):
    with pytest.raises(EvaluationDataError):
        build_reference(str(canonical_folder), str(tmp_path), ["text-short-1"], str(tmp_path / "scratch"), sts=True)


@pytest.mark.parametrize(("promised", "expected"), [((None, None), ("float32", None)), (("int8", 0.9), ("int8", 0.9))])
def test_a_backend_says_what_it_multiplies_in_and_how_close_it_stays(scratch, tmp_path, promised, expected):
    path = tmp_path / "own.py"
    path.write_text(
        "from minilm.kernels.torch_backend import TorchBackend\n\n"
        f"class Own(TorchBackend):\n    precision, min_cosine = {promised!r}\n"
    )
    _, loaded = seat_of(scratch, "backend", f"{path}:Own")
    assert (loaded["precision"], loaded["min_cosine"]) == expected


@pytest.fixture
def own_gelu(tmp_path):
    """A backend that is right in all but one operation."""
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\nfrom minilm.kernels.torch_backend import TorchBackend\n\n"
        "class Own(TorchBackend):\n    def gelu(self, x):\n        return x * torch.sigmoid(1.702 * x)\n"
    )
    return f"{path}:Own"


def test_every_operation_is_held_against_float64(scratch, own_gelu):
    seat, _ = seat_of(scratch, "backend", own_gelu)
    rows = {row["operation"]: row for row in seat.parity()["rows"]}
    assert not rows["gelu"]["ok"]
    assert rows["attention, gradients"]["ok"]
    assert {row["dtype"] for row in rows.values()} == {"float32"}
    json.dumps(rows, allow_nan=False)
