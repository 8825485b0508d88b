"""The canonical folder: what is written comes back, and what decides a vector is fingerprinted."""

import dataclasses
import hashlib
import json
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import BertModel

from minilm.batch import PackedBatch
from minilm.config import EncodingConfig
from minilm.encoder import SentenceEncoder
from minilm.weights import checkpoint as module
from minilm.weights.checkpoint import fingerprint, is_canonical
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint


@pytest.fixture
def checkpoint(bert_folder):
    encoding = EncodingConfig("avg_first_last", "first_layer", False, 77, "dot", {"query": "q: "}, "query")
    golden = [{"text": "a cat", "ids": [2, 5, 6, 3], "vector": [0.1, -1e-9]}]
    calibration = torch.stack([-torch.arange(32) / 3, torch.arange(32) * 1e-8])
    read = read_checkpoint(bert_folder())
    return dataclasses.replace(read, encoding=encoding, golden=golden, calibration=calibration)


def altered(tensors, name, change):
    """Return the tensors with one of them changed."""
    return tensors | {name: change(tensors[name].clone())}


def test_what_is_saved_is_read_again(checkpoint, tmp_path):
    folder = checkpoint.save(tmp_path / "deep" / "canonical")
    again = read_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    assert again.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
        assert again.tensors[name].dtype == tensor.dtype, name
    for name in ("config", "encoding", "tokenizer_json", "provenance", "golden", "ignored"):
        assert getattr(again, name) == getattr(checkpoint, name), name
    assert torch.equal(again.calibration, checkpoint.calibration)
    assert read_checkpoint(folder / "model.safetensors").encoding == checkpoint.encoding


def test_the_metadata_says_everything_in_json(checkpoint, tmp_path):
    folder = checkpoint.save(tmp_path / "canonical")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata.pop("format"), metadata.pop("format_version")) == ("minilm", "2")
    values = {name: json.loads(value) for name, value in metadata.items()}
    assert values.keys() == {"config", "encoding", "provenance", "calibration", "golden", "fingerprint", "checksum"}
    assert values["encoding"]["pooling"] == "avg_first_last"
    assert values["encoding"]["max_seq_length"] == 77
    assert values["encoding"]["normalize"] is False
    assert values["provenance"].keys() == {
        "source", "source_format", "source_sha256", "source_max_seq_length", "licence", "converted_with",
    }  # fmt: skip
    assert values["fingerprint"] == fingerprint(checkpoint) == read_checkpoint(folder).stored_fingerprint


def test_optional_tensors_are_no_part_of_the_model(checkpoint):
    left_out = checkpoint.tensors.keys() - checkpoint.model_tensors.keys()
    assert left_out == {"pooler.weight", "pooler.bias", "embeddings.position_ids"}


def test_saving_again_replaces_the_canonical_folder(checkpoint, tmp_path):
    folder = checkpoint.save(tmp_path / "canonical")
    loaded = read_checkpoint(folder)  # its tensors are mapped from the very file that is replaced
    dataclasses.replace(loaded, encoding=EncodingConfig()).save(folder)
    assert read_checkpoint(folder).encoding == EncodingConfig()
    assert torch.equal(
        read_checkpoint(folder).tensors["embeddings.word.weight"], loaded.tensors["embeddings.word.weight"]
    )
    assert [path.name for path in tmp_path.iterdir() if "canonical" in path.name] == ["canonical"]


def test_a_card_stays_with_the_weights_it_tells_of(checkpoint, tmp_path):
    folder = dataclasses.replace(checkpoint, card="# A card: café\n").save(tmp_path / "canonical")
    again = read_checkpoint(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == again.card == "# A card: café\n"
    assert (read_checkpoint(again.save(tmp_path / "copy"))).card == again.card
    changed = [
        again.with_dtype(torch.float16),
        again.with_encoding(max_seq_length=20),
        again.with_encoding(pooling="max"),
        again.with_weights(again.tensors),
    ]
    assert [other.card for other in changed] == [None] * 4
    changed[0].save(folder)  # an old card goes with the old weights
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    (folder / "README.md").write_bytes(b"\xff")
    assert read_checkpoint(folder).card == "\ufffd"  # no reason not to load


def test_some_of_the_layers_are_a_smaller_model(weights_folder):
    bert = BertModel.from_pretrained(weights_folder, add_pooling_layer=False, attn_implementation="eager").eval()
    bert.encoder.layer = torch.nn.ModuleList([bert.encoder.layer[index] for index in (0, 3, 5)])
    small = read_checkpoint(weights_folder).with_layers([1, 4, 6])
    assert small.config.num_layers == 3
    ids = torch.tensor([101, 1037, 2158, 2003, 2652, 1037, 2858, 1012, 102])
    with torch.no_grad():
        expected = bert(ids[None]).last_hidden_state[0]
        vectors = SentenceEncoder(small).model(PackedBatch.from_sequences([ids.tolist()])).last_hidden_state
    torch.testing.assert_close(vectors, expected, atol=5e-6, rtol=0)


def test_what_was_told_of_the_whole_is_not_told_of_some_layers(checkpoint, tmp_path):
    small = checkpoint.with_layers([1])
    assert (small.golden, small.calibration, small.card) == (None, None, None)
    again = read_checkpoint(small.save(tmp_path / "small"))
    assert fingerprint(again) == fingerprint(small) != fingerprint(checkpoint)
    assert fingerprint(checkpoint.with_layers([1, 2])) == fingerprint(checkpoint)


@pytest.mark.parametrize("layers", [[], [0], [3], [2, 1], [1, 1], ["1"]])
def test_layers_that_there_are_not(checkpoint, layers):
    with pytest.raises(ValueError, match="expected layers in rising order from 1 to 2, got"):
        checkpoint.with_layers(layers)


@pytest.mark.parametrize("held", ["notes.txt", "model.safetensors"])
def test_a_folder_that_is_not_ours_is_left_alone(checkpoint, bert_state, tmp_path, held):
    folder = tmp_path / "mine"
    if held == "model.safetensors":  # a file of that name, but of another format
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(bert_state, folder / held)
    else:
        checkpoint.save(folder)
        (folder / held).write_text("precious")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match=f"not empty.*{held}.*name a new folder"):
        checkpoint.save(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_replacement_that_fails_brings_the_old_folder_back(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path / "canonical")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    rename, refused = Path.rename, iter([False, True, False])  # aside, into place, back

    def rename_or_refuse(path, target):
        if next(refused):
            raise OSError("busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_refuse)
    with pytest.raises(OSError, match="busy"):
        checkpoint.save(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_is_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(WeightsError, match="is a file"):
        checkpoint.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupted_save_leaves_what_was_there(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path / "canonical")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fill_the_disk(path, *_):
        path.write_bytes(b"half a fil")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_safetensors", fill_the_disk)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(target)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "canonical"]


def test_tensors_that_do_not_fit_are_not_saved(checkpoint, tmp_path):
    tensors = altered(checkpoint.tensors, "embeddings.norm.bias", lambda tensor: tensor[:5])
    with pytest.raises(WeightsError, match=r"embeddings.norm.bias is \[5\], expected \[32\]"):
        dataclasses.replace(checkpoint, tensors=tensors).save(tmp_path / "canonical")
    assert not (tmp_path / "canonical").exists()


def test_a_file_that_cannot_be_written_is_an_os_error(checkpoint, tmp_path, monkeypatch):
    def fill_the_disk(*_, **__):
        raise SafetensorError("no space left on device")

    monkeypatch.setattr("minilm.weights.files.save_file", fill_the_disk)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written \(no space"):
        checkpoint.save(tmp_path / "canonical")


def test_others_may_read_what_was_saved(checkpoint, tmp_path):
    folder = checkpoint.save(tmp_path / "canonical")
    (tmp_path / "ordinary").write_text("")
    (tmp_path / "ordinary_folder").mkdir()
    mode = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
    assert folder.stat().st_mode == (tmp_path / "ordinary_folder").stat().st_mode


def test_trained_tensors_can_be_saved(checkpoint, tmp_path):
    """Parameters, transposed and shared memory are what a trainer hands over."""
    shared = torch.randn(3, 32)
    tensors = altered(checkpoint.tensors, "embeddings.token_type.weight", lambda _: torch.nn.Parameter(shared[:2]))
    tensors |= {"embeddings.norm.bias": shared[2], "layers.0.attention.output.weight": torch.randn(32, 32).T}
    again = read_checkpoint(dataclasses.replace(checkpoint, tensors=tensors).save(tmp_path / "trained"))
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"provenance": {"source": "elsewhere"}},
        lambda c: {"tensors": c.model_tensors},
        lambda c: {"tensors": dict(reversed(c.tensors.items()))},
        lambda c: {"tensors": altered(c.tensors, "embeddings.word.weight", torch.Tensor.double)},
        lambda c: {"tokenizer_json": json.dumps(json.loads(c.tokenizer_json), indent=3)},
        lambda _: {"calibration": None, "golden": None, "ignored": ("decoder.bias",)},
        lambda c: {"config": dataclasses.replace(c.config, hidden_dropout=0.5)},
    ],
    ids=["provenance", "no optional tensors", "order", "dtype", "spaces in the tokenizer", "calibration", "dropout"],
)
def test_the_fingerprint_is_not_moved_by_what_moves_no_vector(checkpoint, change):
    assert fingerprint(dataclasses.replace(checkpoint, **change(checkpoint))) == fingerprint(checkpoint)


def flip_lowest_bit(tensor):
    tensor.view(-1).view(torch.int32)[-1] ^= 1
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"tensors": altered(c.tensors, "layers.1.feed_forward_norm.bias", flip_lowest_bit)},
        lambda c: {"tokenizer_json": c.tokenizer_json.replace('"lowercase": true', '"lowercase": false')},
        lambda c: {"encoding": dataclasses.replace(c.encoding, pooling="mean")},
        lambda c: {"encoding": dataclasses.replace(c.encoding, max_seq_length=78)},
        lambda c: {"config": dataclasses.replace(c.config, num_heads=2)},
        lambda c: {"config": dataclasses.replace(c.config, layer_norm_eps=1e-5)},
    ],
    ids=["a bit", "tokenizer", "pooling", "length", "heads", "epsilon"],
)
def test_the_fingerprint_is_moved_by_what_moves_a_vector(checkpoint, change):
    assert fingerprint(dataclasses.replace(checkpoint, **change(checkpoint))) != fingerprint(checkpoint)


def test_an_altered_bit_in_the_file_is_an_error(checkpoint, tmp_path):
    path = checkpoint.save(tmp_path / "canonical") / "model.safetensors"
    assert fingerprint(read_checkpoint(path)) == read_checkpoint(path).stored_fingerprint
    data = bytearray(path.read_bytes())
    header_size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + header_size])
    data[8 + header_size + header["layers.0.attention.qkv.weight"]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="canonical is damaged: not what was saved there"):
        read_checkpoint(path)


@pytest.mark.parametrize("damage", ["swapped words", "a moved row", "two signs", "the end"])
def test_damage_that_sums_could_hide_is_an_error(damage):
    table = torch.randn(30, 1_024, generator=torch.Generator().manual_seed(0)).numpy()  # rows of 4 KiB
    before = module._checksum({"table": torch.from_numpy(table.copy())}, "{}")
    words = table.view("<u8")
    if damage == "swapped words":
        words[3, [5, 7]] = words[3, [7, 5]]
    elif damage == "a moved row":
        table[[1, 2]] = table[[2, 1]]
    elif damage == "two signs":
        words[4, [1, 3]] ^= 1 << 63
    else:
        table[29, 1_023] += 1
    assert module._checksum({"table": torch.from_numpy(table)}, "{}") != before
    assert module._checksum({"table": torch.from_numpy(table.reshape(-1)[:-1])}, "{}") != before


@pytest.mark.parametrize("damaged", [False, True])
def test_files_of_version_1_are_read(checkpoint, tmp_path, damaged):
    """They hold the sha256 of the tokenizer and of every tensor's bytes."""
    path = checkpoint.save(tmp_path / "canonical") / "model.safetensors"
    digest = hashlib.sha256(checkpoint.tokenizer_json.encode())
    for _, tensor in sorted(checkpoint.tensors.items()):
        digest.update(tensor.numpy().tobytes())
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= {"format_version": "1", "checksum": json.dumps(digest.hexdigest())}
    text, content = json.dumps(header).encode(), bytearray(data[8 + size :])
    content[-1] ^= damaged
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    if damaged:
        with pytest.raises(WeightsError, match="canonical is damaged: not what was saved there"):
            read_checkpoint(path)
    else:
        assert fingerprint(read_checkpoint(path)) == fingerprint(checkpoint)


def test_the_fingerprint_of_the_real_weights_never_changes(weights_folder, tmp_path):
    """A stored fingerprint must be found again by every later version, on every machine."""
    checkpoint = read_checkpoint(weights_folder)
    expected = "04b3faac20e218145a7a0d44c6ac4f940cd987a7d53b68e5a4cb7d8a050b07eb"
    assert fingerprint(checkpoint) == expected
    assert read_checkpoint(checkpoint.save(tmp_path / "canonical")).stored_fingerprint == expected


def test_is_canonical(checkpoint, bert_folder, tmp_path):
    assert is_canonical(checkpoint.save(tmp_path / "canonical") / "model.safetensors")
    assert not is_canonical(bert_folder("other") / "model.safetensors")
    assert not is_canonical(tmp_path / "nothing" / "model.safetensors")
