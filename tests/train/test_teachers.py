"""Teachers' vectors: computed once, kept whole through any death of the process, each teacher's its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from minilm.evaluate.sts import evaluate_sts
from minilm.train.states import StatePooler
from minilm.train.teacher_cache import CachedTeacher
from minilm.train.teachers import Ensemble, InnerLayer, encode, load_teacher, teacher_identity

TEXTS = [f"sentence {i}" for i in range(50)]


class Teacher:
    """Gives each text a vector of its own, and remembers what it was asked."""

    def __init__(self, identity="a teacher", width=6, seed=0):
        self.identity, self.width, self.seed, self.asked = identity, width, seed, []

    def encode(self, sentences):
        self.asked += sentences
        return np.stack([self.vector(text) for text in sentences])

    def vector(self, text):
        generator = np.random.default_rng([self.seed, *text.encode()])
        return generator.normal(size=self.width).astype(np.float32) * 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_text_is_computed_once(tmp_path, dtype):
    teacher = Teacher()
    cached = CachedTeacher(tmp_path / "cache", teacher, dtype=dtype)
    expected = Teacher().encode(TEXTS).astype(dtype).astype(np.float32)
    assert cached.embed([*TEXTS[:20], *TEXTS[:5]], chunk_size=7) == 20
    assert cached.embed(iter(TEXTS), chunk_size=7) == 30
    assert sorted(teacher.asked) == sorted(TEXTS)
    for reader in (cached, CachedTeacher(tmp_path / "cache")):
        vectors = reader.encode([*TEXTS[::-1], TEXTS[3]])
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, np.concatenate([expected[::-1], expected[3:4]]))
        assert len(reader) == 50
    assert len(teacher.asked) == 50


def test_the_files_are_numpys(tmp_path):
    cached = CachedTeacher(tmp_path, Teacher())
    cached.embed(TEXTS, chunk_size=16)
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert (vectors.dtype, vectors.shape) == (np.float16, (50, 6))
    assert np.array_equal(vectors, Teacher().encode(TEXTS).astype(np.float16))
    assert np.array_equal(cached.vectors, vectors)
    assert isinstance(cached.vectors, np.memmap)
    assert np.load(tmp_path / "keys.npy").shape == (50,)


def test_encode_computes_what_lacks(tmp_path):
    cached = CachedTeacher(tmp_path, teacher := Teacher())
    cached.encode(TEXTS[:3])
    cached.encode(TEXTS[:5])
    assert teacher.asked == TEXTS[:5]
    assert cached.encode([]).shape == (0, 6)
    with pytest.raises(
        ValueError, match=r"lacks the vectors of 1 texts or more, such as 'sentence 7', and there is no"
    ):
        CachedTeacher(tmp_path).encode(["sentence 1", "sentence 7"])


def test_a_cache_is_its_teachers_own(tmp_path):
    CachedTeacher(tmp_path, Teacher()).embed(TEXTS)
    with pytest.raises(ValueError, match="teacher 'a teacher', not 'another'; choose another folder"):
        CachedTeacher(tmp_path, Teacher("another"))
    with pytest.raises(ValueError, match="dtype 'float16', not 'float32'"):
        CachedTeacher(tmp_path, Teacher(), dtype="float32")
    with pytest.raises(ValueError, match="dtype must be one of float16, float32"):
        CachedTeacher(tmp_path, Teacher(), dtype="int8")
    assert len(CachedTeacher(tmp_path, Teacher("x"), identity="a teacher")) == 50


class Fixed:
    identity = "fixed"

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, _sentences):
        return self.vectors


@pytest.mark.parametrize(
    "vectors", [np.zeros((2, 3)), np.full((1, 3), np.nan), np.zeros(3), np.full((1, 3), 1e6)], ids=str
)
def test_unusable_vectors_are_refused_and_leave_nothing(tmp_path, vectors):
    cached = CachedTeacher(tmp_path, Fixed(vectors))
    with pytest.raises(ValueError, match="expected"):
        cached.embed(["one"])
    assert len(cached) == 0
    assert CachedTeacher(tmp_path, Fixed(np.ones((1, 4)))).embed(["one"]) == 1
    with pytest.raises(ValueError, match=r"expected vectors \[n, 4\] that float16 can hold, got \[1, 3\]"):
        CachedTeacher(tmp_path, Fixed(np.ones((1, 3)))).embed(["two"])


# Interrupted.


@pytest.mark.parametrize("cut", [("vectors.npy", 5), ("keys.npy", 3), ("keys.npy", 16), ("vectors.npy", 40)], ids=str)
def test_torn_files_are_mended(tmp_path, cut):
    """A write that did not end: some last bytes of one file are not there, and the header may know of fewer rows."""
    CachedTeacher(tmp_path, Teacher()).embed(TEXTS[:10])
    path = tmp_path / cut[0]
    os.truncate(path, path.stat().st_size - cut[1])
    left = len(CachedTeacher(tmp_path))
    assert 6 <= left < 10
    resumed = CachedTeacher(tmp_path, teacher := Teacher())
    assert resumed.embed(TEXTS) == 50 - left
    assert teacher.asked == TEXTS[left:]
    assert np.array_equal(resumed.encode(TEXTS), Teacher().encode(TEXTS).astype(np.float16))
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), Teacher().encode(TEXTS).astype(np.float16))


KILLED = """
import sys, time
import numpy as np
from minilm.train.teacher_cache import CachedTeacher

class Teacher:
    identity = "slow"
    def encode(self, sentences):
        time.sleep(0.001)
        return np.array([[hash_of(text), 1.0, len(text)] for text in sentences], np.float32)

def hash_of(text):
    return sum(i * b for i, b in enumerate(text.encode())) % 1000 / 7

texts = [f"text {i} " + "x" * (i % 50) for i in range(2_000)]
print("ready", flush=True)
print(CachedTeacher(sys.argv[1], Teacher()).embed(texts, chunk_size=4, show_progress_bar=False), flush=True)
"""


def start(folder):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_at_any_time_it_ends_with_the_same_files(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.communicate()[0] == "2000\n"
    folder, counts = tmp_path / "killed", [0]
    for wait in (0.05, 0.15):
        process = start(folder)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts.append(len(CachedTeacher(folder)))
    assert counts == sorted(counts)
    assert counts[1] < 2000
    last = start(folder)
    assert last.communicate()[0] == f"{2000 - counts[-1]}\n"
    for name in ("vectors.npy", "keys.npy", "teacher.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_share_a_cache(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    added = sum(int(process.communicate()[0]) for process in processes)
    assert added == 2000
    assert len(CachedTeacher(tmp_path)) == 2000


# Ensembles, and who a teacher is.


@pytest.mark.parametrize("weights", [(), (1, 2, 0.5)], ids=["equal", "weighted"])
def test_the_inner_product_of_an_ensemble_is_the_mean_of_cosines(tmp_path, weights):
    teachers = [Teacher("a", 6, 1), Teacher("b", 11, 2), Teacher("c", 3, 3)]
    parts = [CachedTeacher(tmp_path / t.identity, t, dtype="float32") for t in teachers[:2]]
    vectors = Ensemble([*parts, teachers[2]], weights).encode(TEXTS)
    cosines = []
    for teacher in teachers:
        own = teacher.encode(TEXTS).astype(np.float64)
        norms = np.sqrt((own**2).sum(axis=1))
        cosines.append(own @ own.T / np.outer(norms, norms))
    mean = np.average(cosines, axis=0, weights=weights or None)
    assert vectors.shape == (50, 20)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors.astype(np.float64) @ vectors.T, mean, atol=1e-6)


def test_an_ensemble_can_be_cached_and_has_its_members_identity(tmp_path):
    ensemble = Ensemble([Teacher("a"), Teacher("b", seed=1)])
    assert ensemble.identity == "ensemble of 0.5 a, 0.5 b"
    cached = CachedTeacher(tmp_path, ensemble)
    np.testing.assert_allclose(cached.encode(TEXTS), ensemble.encode(TEXTS), atol=1e-3)
    with pytest.raises(ValueError, match="choose another folder"):
        CachedTeacher(tmp_path, Ensemble([Teacher("a"), Teacher("b")], [1, 2]))
    assert teacher_identity(Ensemble([cached])) == "ensemble of 1 ensemble of 0.5 a, 0.5 b"
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])
    for weights in ([1], [1, 0], [1, float("nan")]):
        with pytest.raises(ValueError, match="expected 2 positive weights"):
            Ensemble([Teacher("a"), Teacher("b")], weights)


def test_an_inner_layer_is_its_hidden_state_averaged(own_encoder):
    texts = ["a man", "the old bird sees the water", "water"] * 3
    for layer in (0, 1):
        teacher = InnerLayer(own_encoder, f"layer.{layer}")
        found = teacher.encode(texts)
        for text, vector in zip(texts, found, strict=True):
            batch = StatePooler(own_encoder, ()).pack([text])[0][0]
            states = own_encoder.model(batch, hidden_states=True).hidden_states[layer]
            np.testing.assert_allclose(vector, states.detach().double().mean(0), atol=1e-5)
        assert teacher_identity(teacher) == f"layer.{layer} of {teacher_identity(own_encoder)}"
    with pytest.raises(ValueError, match=r"got 'layer\.9'"):
        InnerLayer(own_encoder, "layer.9")


def test_an_inner_layer_by_name(own_encoder, tmp_path):
    own_encoder.save(tmp_path / "model")
    teacher = load_teacher(f"{tmp_path / 'model'}:layer.0")
    np.testing.assert_allclose(
        teacher.encode(["a man"]), InnerLayer(own_encoder, "layer.0").encode(["a man"]), atol=1e-6
    )


def test_a_zero_vector_stays_zero():
    vectors = Ensemble([Fixed(np.zeros((1, 2))), Fixed([[0.0, 3.0]])]).encode(["x"])
    np.testing.assert_allclose(vectors, [[0, 0, 0, 0.5**0.5]], rtol=1e-6)


def test_identities(own_encoder):
    before = teacher_identity(own_encoder)
    assert before == teacher_identity(own_encoder)
    own_encoder.max_seq_length = 64
    assert teacher_identity(own_encoder) != before
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert teacher_identity(first) != teacher_identity(second)
    second.load_state_dict(first.state_dict())
    assert teacher_identity(first) == teacher_identity(second)
    assert teacher_identity(first.to(torch.bfloat16)) != teacher_identity(second)
    with pytest.raises(ValueError, match="object says not who it is"):
        teacher_identity(object())


def test_tensors_of_any_dtype_are_taken():
    given = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    assert np.array_equal(encode(Fixed(given), ["a", "b"]), np.ones((2, 3), np.float32))


# Real teachers.


def test_this_librarys_encoder_is_a_teacher(tmp_path, weights_folder, texts, encoder):
    teacher = load_teacher(weights_folder, device="cpu")
    cached = CachedTeacher(tmp_path, teacher, dtype="float32")
    np.testing.assert_allclose(cached.encode(texts), encoder.encode(texts), atol=1e-6)
    assert json.loads((tmp_path / "teacher.json").read_text())["teacher"].startswith("minilm ")


def test_a_teacher_in_bfloat16_is_another_that_says_nearly_the_same(weights_folder, texts, encoder):
    teacher = load_teacher(weights_folder, device="cpu", dtype="bfloat16")
    cosines = (encode(teacher, texts) * encoder.encode(texts)).sum(axis=1)
    assert 0.99 < cosines.min() < 0.999999
    assert teacher_identity(teacher) != teacher_identity(load_teacher(weights_folder, device="cpu"))


@pytest.fixture
def mpnet_folder(tmp_path, weights_folder):
    """A small random MPNet, with some of the real model's words."""
    from transformers import MPNetConfig, MPNetModel, MPNetTokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = (weights_folder / "vocab.txt").read_text(encoding="utf-8").splitlines()[1000:3000]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *words]), encoding="utf-8"
    )
    MPNetModel(MPNetConfig(vocab_size=3_000, **sizes)).save_pretrained(tmp_path / "mpnet")
    MPNetTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "mpnet")
    return tmp_path / "mpnet"


def test_what_this_library_does_not_take_goes_to_sentence_transformers(mpnet_folder, tmp_path, monkeypatch, caplog):
    from sentence_transformers import SentenceTransformer

    caplog.set_level("INFO", "minilm")
    teacher = load_teacher(mpnet_folder, device="cpu")
    assert isinstance(teacher.model, SentenceTransformer)
    assert "is loaded by sentence-transformers; this library doesn't take it" in caplog.text
    cached = CachedTeacher(tmp_path / "cache", teacher)
    np.testing.assert_allclose(cached.encode(TEXTS[:4]), teacher.encode(TEXTS[:4]), atol=1e-3)
    assert teacher_identity(load_teacher(mpnet_folder, device="cpu")) == cached.identity
    rounded = load_teacher(mpnet_folder, device="cpu", dtype="bfloat16")
    np.testing.assert_allclose(encode(rounded, TEXTS[:4]), teacher.encode(TEXTS[:4]), atol=0.05)
    assert teacher_identity(rounded) != cached.identity
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"needs sentence-transformers as a teacher: pip install"):
        load_teacher(mpnet_folder)


def test_a_cached_ensemble_can_be_evaluated(tmp_path):
    for task in ("stsb",):
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.tsv").write_text("1\tsentence 1\tsentence 2\n3\tsentence 1\tsentence 1\n2\ta\tb\n")
    ensemble = Ensemble([CachedTeacher(tmp_path / "a", Teacher("a")), Teacher("b")])
    assert -100 <= evaluate_sts(ensemble, tmp_path, tasks=["stsb"]).average <= 100
