"""The peers that read the model's graph, each in a process of its own: plain, fused and quantised, against torch."""

import json
import random
import shutil
import sys
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from minilm.batch import PackedBatch
from minilm.bench import onnx_peers
from minilm.bench.engines import Choice, EngineError, is_faithful
from minilm.bench.onnx_peers import EXPORT_ERRORS, OnnxPeer
from minilm.bench.peers import PEERS
from minilm.bench.processes import Worker, WorkerError
from minilm.bench.worker import Seat
from minilm.bench.workloads import Workload

NAMES = [name for name, peer in PEERS.items() if issubclass(peer, OnnxPeer)]
FILES = ("plain.onnx", "fused.onnx", "int8.onnx", "int8_unfused.onnx", "int8.xml")
MODULES = {name: [package.replace("-", "_") for package in PEERS[name].packages] for name in NAMES}


def installed(*modules: str) -> bool:
    return all(find_spec(module) for module in modules)


@pytest.fixture(scope="session")
def exported(scratch, tmp_path_factory):
    """Return a copy of the folder that workers share, with the graphs made."""
    folder = tmp_path_factory.mktemp("exported") / "scratch"
    shutil.copytree(scratch, folder)
    plan = {**json.loads((folder / "plan.json").read_text()), "folder": str(folder / "model")}
    (folder / "plan.json").write_text(json.dumps(plan))
    with closing(Worker("export", folder / "export.log")) as worker:
        errors = worker.ask("export", 120, names=FILES, plan=plan)["errors"]
    (folder / "model" / EXPORT_ERRORS).write_text(json.dumps(errors))
    return folder


def loaded(worker: Worker, name: str, folder: Path, dtype: str = "float32") -> dict:
    choice = Choice(name, "peer", name, dtype, "cpu", str(folder), 1)
    return worker.ask("load", 60, **asdict(choice))


@pytest.mark.parametrize("name", NAMES)
def test_peers_give_the_reference_s_rows_and_tell_nobody(exported, tmp_path, monkeypatch, name):
    if not installed(*MODULES[name]):
        pytest.skip(f"{name} is not installed")
    home = tmp_path / "home"  # where those that report their use keep what they will send
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with closing(Worker(name, tmp_path / "log", 1)) as worker:
        facts = loaded(worker, name, exported)
        assert facts["workloads"] == ["text-short-2", "text-mixed-6"]
        assert facts["threads"] == 1
        assert facts["precision"] == ("int8" if "int8" in name else "float32")
        answer = worker.ask("prepare", 60, names=facts["workloads"], seconds=60)
        assert answer["failed"] == {}
        for workload in answer["ready"].values():
            assert is_faithful(workload, facts["precision"], facts["min_cosine"])
            assert (workload["max_error"] < 1e-5) == (facts["precision"] == "float32"), "int8 is not exact"
        assert worker.ask("measure", 60, name="text-short-2", seconds=0.01)["calls"] >= 1
    assert list(home.iterdir()) == []


def test_openvino_computes_in_the_precision_asked_for(exported, tmp_path):
    if not installed("openvino", "onnx"):
        pytest.skip("openvino is not installed")
    with closing(Worker("openvino", tmp_path / "log", 1)) as worker:
        try:
            loaded(worker, "openvino", exported, "bfloat16")
        except WorkerError as error:
            assert "openvino has no bfloat16 on this CPU" in error.message  # noqa: PT017
            return
        facts = worker.ask("prepare", 60, names=["text-short-2"], seconds=60)["ready"]["text-short-2"]
    assert 1e-4 < facts["max_error"] < 0.03


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("fused.onnx", {"Attention": 6, "BiasGelu": 6, "SkipLayerNormalization": 12, "EmbedLayerNormalization": 1}),
        ("int8.onnx", {"QAttention": 6, "MatMulInteger": 18, "SkipLayerNormalization": 12}),
        ("int8_unfused.onnx", {"MatMulInteger": 36, "MatMul": 12}),
    ],
)
def test_peers_get_the_graph_that_their_tools_make(exported, file, expected):
    onnx = pytest.importorskip("onnx")
    if not installed("onnxruntime"):
        pytest.skip("onnxruntime is not installed")
    found = Counter(node.op_type for node in onnx.load(exported / "model" / file).graph.node)
    assert {name: found[name] for name in expected} == expected
    assert not {name for name in found if "FastGelu" in name}


def test_cls_pooling_without_scaling(exported, encoder, tmp_path):
    if not installed("onnxruntime", "onnx"):
        pytest.skip("onnxruntime is not installed")
    folder = tmp_path / "scratch"
    shutil.copytree(exported, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"folder": str(folder / "model"), "encoding": {**plan["encoding"], "pooling": "cls", "normalize": False}}
    (folder / "plan.json").write_text(json.dumps(plan))
    workload = Workload.from_dict(json.loads((folder / "workloads.json").read_text())[0])
    sequences = [encoder.tokenizer(text).ids for text in workload.texts]
    hidden = encoder.model(PackedBatch.from_sequences(sequences))
    first = [hidden.last_hidden_state[start] for start in np.cumsum([0, *map(len, sequences[:-1])])]
    np.save(folder / "reference" / f"{workload.name}.npy", np.stack([row.detach().numpy() for row in first]))
    with closing(Worker("cls", tmp_path / "log", 1)) as worker:
        assert worker.ask("export", 120, names=["plain.onnx"], plan=plan)["errors"] == {}
        loaded(worker, "onnxruntime-unfused", folder)
        facts = worker.ask("prepare", 60, names=[workload.name], seconds=60)["ready"][workload.name]
    assert facts["max_error"] < 1e-5


def test_what_can_not_be_made_is_told_in_place_of_the_peer(exported, tmp_path):
    folder = tmp_path / "scratch"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.onnx", "*.xml", "*.bin"))
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"folder": str(folder / "model"), "encoding": {**plan["encoding"], "pooling": "max"}}
    (folder / "plan.json").write_text(json.dumps(plan))
    if installed("onnx"):
        with closing(Worker("export", tmp_path / "log")) as worker:
            errors = worker.ask("export", 60, names=["plain.onnx"], plan=plan)["errors"]
        assert errors["plain.onnx"].startswith("ValueError: the ONNX graph pools by mean or cls")
        (folder / "model" / EXPORT_ERRORS).write_text(json.dumps(errors))
    else:
        (folder / "model" / EXPORT_ERRORS).write_text(json.dumps({"plain.onnx": "ValueError: the ONNX graph pools by"}))
    peer = PEERS["openvino"](Choice("o", "peer", "openvino", "float32", "cpu", str(folder)))
    with pytest.raises(EngineError, match=r"plain\.onnx could not be made: ValueError: the ONNX graph pools by"):
        _ = peer.path


class Doubling(OnnxPeer):
    """Returns of each text its ids' sum and their number, padding left out, and notes the shapes of its batches."""

    file = "none"

    def session(self):
        self.shapes = []

        def run(inputs):
            assert inputs["token_type_ids"].sum() == 0
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            self.shapes.append(ids.shape)
            return np.stack([(ids * mask).sum(axis=1), mask.sum(axis=1)], axis=1).astype(np.float32)

        return run


def test_texts_are_encoded_in_batches_of_like_length_and_come_back_in_order(scratch, encoder, own_sentences):
    peer = Doubling(Choice("d", "peer", "doubling", "float32", "cpu", str(scratch)))
    peer.load()
    texts = tuple(random.Random(0).sample(own_sentences * 2, 2 * len(own_sentences)))
    rows = peer.call(Workload("t", "texts", "", texts=texts, limit=9), 0)()
    encoder_ids = [encoder.tokenizer(text).ids for text in texts]
    cut = [ids if len(ids) <= 9 else [*ids[:8], ids[-1]] for ids in encoder_ids]
    assert rows.tolist() == [[sum(ids), len(ids)] for ids in cut]
    assert [shape[0] for shape in peer.shapes] == [32] * (len(texts) // 32) + [len(texts) % 32]
    peer.shapes.clear()
    peer.call(Workload("t", "texts", "", texts=texts, limit=128), 0)()
    lengths = [shape[1] for shape in peer.shapes]
    assert lengths[0] > 1.3 * lengths[-1]


def test_threads_are_those_asked_for_or_all_that_there_are(scratch, monkeypatch):
    choices = [Choice("d", "peer", "doubling", "float32", "cpu", str(scratch), threads) for threads in (3, None)]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert [Doubling(choice).num_threads for choice in choices] == [3, 3]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "fastembed"])
def test_a_peer_that_is_not_installed_names_the_extra(scratch, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r'.*pip install "minilm\[peers\]"'):
        Seat().load(label=name, role="peer", name=name, dtype="float32", device="cpu", scratch=str(scratch))


def test_int8_peers_are_held_to_a_bound_of_their_own():
    assert PEERS["onnxruntime-int8"].min_cosine == onnx_peers.INT8_COSINE
    rows = {"min_cosine": 0.97, "max_error": (2 * 0.03) ** 0.5}
    assert is_faithful(rows, "int8", onnx_peers.INT8_COSINE)
    assert not is_faithful(rows, "int8", None)
