"""Damaged, foreign and malicious files: always a `WeightsError` that names the file, never a half-read model."""

import json
import pickle
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from minilm.weights.checkpoint import Checkpoint, fingerprint
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 90868376\n"
)


@pytest.fixture
def canonical(bert_folder):
    folder = bert_folder()
    return read_checkpoint(folder).save(folder.with_name("canonical"))


@pytest.fixture
def full_st_folder(st_folder):
    """A sentence-transformers folder with every JSON file that is read, its tokenizer as tokenizer.json."""
    files = {
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "similarity_fn_name": "cosine"},
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
    }
    folder = st_folder(files=files)
    (folder / "tokenizer.json").write_text(read_checkpoint(folder).tokenizer_json, encoding="utf-8")
    (folder / "vocab.txt").unlink()
    return folder


READ_FILES = (
    "config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json",
    "config_sentence_transformers.json", "tokenizer_config.json", "model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", READ_FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: a download or copy was cut short"),
        (LFS_POINTER, "is a git-lfs pointer, not the file itself. Run `git lfs pull`"),
        (b"\xff\xfe\x00", "is not a whole safetensors file|cannot be read as UTF-8"),
        (b"[3]", "is not a whole safetensors file|must hold a JSON object|is not a list of modules"),
        (b"{", "is not a whole safetensors file|is not valid JSON"),
    ],
    ids=["empty", "git-lfs", "binary", "another type", "cut short"],
)
def test_a_damaged_file_is_named(full_st_folder, name, content, message):
    (full_st_folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(full_st_folder)
    assert str(full_st_folder / name) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(full_st_folder, name):
    (full_st_folder / name).unlink()
    with pytest.raises(WeightsError, match=name.rpartition("/")[2].replace(".", r"\.")):
        read_checkpoint(full_st_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_canonical_folder_without_one_of_its_files(canonical, name):
    (canonical / name).unlink()
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        read_checkpoint(canonical)


def test_an_empty_folder_and_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"no model folder that minilm knows: expected .*; found nothing"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(WeightsError, match="does not exist"):
        read_checkpoint(tmp_path / "absent")


def test_a_folder_without_weights_says_what_it_holds(bert_folder):
    folder = bert_folder(weights=None)
    (folder / "tf_model.h5").touch()
    with pytest.raises(
        WeightsError, match=r"expected model\.safetensors or pytorch_model\.bin, found config\.json, tf_model"
    ):
        read_checkpoint(folder)


# safetensors


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.5, 0.99, -1], ids=str)
@pytest.mark.parametrize("layout", ["canonical", "bert"])
def test_truncated_safetensors(canonical, layout, kept):
    path = canonical.with_name(layout) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)] if kept >= 0 else data[:-1])
    with pytest.raises(WeightsError, match=r"is empty|cut short or altered") as caught:
        read_checkpoint(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("claimed", [0, 1, 10**6, 10**9, 2**63, 2**64 - 1])
def test_a_header_that_claims_more_than_the_file_holds(canonical, claimed):
    path = canonical / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match="cut short or altered"):
        read_checkpoint(canonical)


def test_tensors_that_claim_more_than_the_file_holds(canonical):
    path = canonical / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["layers.0.attention.qkv.weight"]["data_offsets"][1] += 10**9
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(WeightsError, match="cut short or altered"):
        read_checkpoint(canonical)


def test_any_flipped_bit_is_an_error(canonical):
    """In the header, the metadata, the tensors or the tokenizer; unless it only changed a fact about the source."""
    generator = random.Random(5)
    whole = read_checkpoint(canonical)
    refused = 0
    for trial in range(200):
        damaged = canonical.with_name(f"damaged-{trial}")
        shutil.copytree(canonical, damaged)
        path = damaged / generator.choice(["model.safetensors", "model.safetensors", "tokenizer.json"])
        data = bytearray(path.read_bytes())
        end = len(data) if trial % 2 else 8 + struct.unpack("<Q", data[:8])[0]
        data[generator.randrange(min(end, len(data)))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            read = read_checkpoint(damaged)
        except WeightsError:
            refused += 1
        else:
            assert harmless(read, whole)
        shutil.rmtree(damaged)
    assert refused > 150


def harmless(read: Checkpoint, whole: Checkpoint) -> bool:
    """Whether two checkpoints give the same vectors."""
    return fingerprint(read) == fingerprint(whole)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format_version", "3", "has format version 3, this minilm reads 1 and 2. Update minilm"),
        ("config", "{", "damaged metadata"),
        ("config", '{"hidden_size": 0}', "damaged metadata .hidden_size must be a positive integer"),
        ("config", '{"shoe_size": 45}', "damaged metadata .MiniLMConfig has no field shoe_size"),
        ("encoding", '{"pooling": "sum"}', "damaged metadata .pooling must be one of"),
        ("encoding", "3", "damaged metadata"),
        ("calibration", '[["a"]]', "damaged metadata"),
        ("calibration", "[[1, 2], [3, 4]]", r"damaged metadata .calibration must be \[2, 32\], got \[2, 2\]"),
        ("provenance", None, "damaged metadata .'provenance'"),
        ("config", '{"vocab_size": 41, "num_layers": 3}', r"missing \(12\): layers.2"),
    ],
    ids=str,
)
def test_damaged_metadata(canonical, name, value, message):
    path = canonical / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= {name: value}
    header["__metadata__"] = {key: text for key, text in header["__metadata__"].items() if text is not None}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(canonical)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_numbers(bert_folder, bert_state, dtype, value):
    state = {name: tensor if "_ids" in name else tensor.to(dtype) for name, tensor in bert_state.items()}
    state["encoder.layer.1.intermediate.dense.bias"][17] = value
    with pytest.raises(WeightsError, match=r"wrong values .* \(1\): encoder.layer.1.intermediate.dense.bias"):
        read_checkpoint(bert_folder(state=state))


@pytest.mark.parametrize(
    "change", [lambda v: v[:-1], lambda v: [*v, "more"], lambda v: v[:9]], ids=["less", "more", "cut"]
)
def test_a_vocabulary_of_the_wrong_size(bert_folder, vocabulary, change):
    with pytest.raises(WeightsError, match=r"has \d+ tokens for 41 rows of the word embedding table"):
        read_checkpoint(bert_folder(vocab=change(vocabulary)))


def test_the_tokenizer_of_another_model_in_a_canonical_folder(canonical, weights_folder):
    (canonical / "tokenizer.json").write_bytes((weights_folder / "tokenizer.json").read_bytes())
    with pytest.raises(WeightsError, match=r"tokenizer.json has 30522 tokens for 41 rows"):
        read_checkpoint(canonical)


# Pickles


class Payload:
    """Something whose unpickling runs a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_bare_pickle(state, path):
    path.write_bytes(pickle.dumps(state))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, write_legacy, write_bare_pickle], ids=["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(bert_folder, bert_state, tmp_path, write):
    folder = bert_folder(weights=None)
    write({**bert_state, "payload": Payload(tmp_path / "was-run")}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin is refused: .* any code.* safetensors.torch.save_file"):
        read_checkpoint(folder)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.3, 0.9, 0.999], ids=str)
def test_truncated_pickles(bert_folder, bert_state, zipped, kept):
    folder = bert_folder(weights=None)
    path = folder / "pytorch_model.bin"
    torch.save(bert_state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(
        WeightsError, match=r"pytorch_model.bin is (empty|refused: it is damaged|not a whole PyTorch file)"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "must hold a dictionary of tensors, got list"),
        ({"epoch": 3, "model": {"a": torch.ones(2)}}, r"these are not: epoch, model. If it is a training checkpoint"),
        (LFS_POINTER, "git-lfs pointer"),
    ],
    ids=["list", "training checkpoint", "git-lfs"],
)
def test_pickles_of_something_else(bert_folder, value, message):
    folder = bert_folder(weights=None)
    path = folder / "pytorch_model.bin"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize("index", ['{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "[]"])
def test_a_damaged_index(bert_folder, index):
    folder = bert_folder(weights=None)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"index\.json (has no weight_map|must hold a JSON object)"):
        read_checkpoint(folder)


def test_an_index_cannot_lead_out_of_the_folder(bert_folder, bert_state, tmp_path):
    folder = bert_folder(weights=None)
    save_file(bert_state, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(bert_state, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"elsewhere\.safetensors is missing"):
        read_checkpoint(folder)
