"""Exports: every tensor comes back, and other people's packages compute the same vectors from them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import BertModel, BertTokenizerFast

from minilm.config import EncodingConfig
from minilm.weights import export as module
from minilm.weights.export import export_modelscope, export_sentence_transformers
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint

EXPORTS = {"sentence-transformers": export_sentence_transformers, "modelscope": export_modelscope}
SENTENCES = [
    "A man is eating food.",
    "Straße, CAFÉ and naïve İstanbul: 猫が好き!",
    "",
    "[SEP] is not the end",
    "word " * 200,
]

both = pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())


def identical(tensors, others):
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name]) for name in tensors
    )


@pytest.fixture
def checkpoint(bert_folder):
    return read_checkpoint(bert_folder())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["with pooler and positions", "without"])
def test_every_tensor_comes_back(bert_folder, bert_state, tmp_path, export, dtype, optional):
    state = {name: tensor if "_ids" in name else tensor.to(dtype) for name, tensor in bert_state.items()}
    if not optional:
        state = {name: tensor for name, tensor in state.items() if "pooler" not in name and "_ids" not in name}
    canonical = read_checkpoint(read_checkpoint(bert_folder(state=state)).save(tmp_path / "canonical"))
    again = read_checkpoint(export(canonical, tmp_path / "exported"))
    assert identical(again.tensors, canonical.tensors)
    assert (again.config, again.tokenizer_json) == (canonical.config, canonical.tokenizer_json)
    assert len(again.tensors) == (32 if optional else 29)


@both
def test_the_real_tensors_come_back(weights_folder, tmp_path, export):
    checkpoint = read_checkpoint(weights_folder)
    again = read_checkpoint(export(checkpoint, tmp_path / "exported"))
    assert identical(again.tensors, checkpoint.tensors)
    assert json.loads(again.tokenizer_json) == json.loads(checkpoint.tokenizer_json)
    if export is export_sentence_transformers:
        assert identical(
            load_file(tmp_path / "exported" / "model.safetensors"), load_file(weights_folder / "model.safetensors")
        )


ENCODINGS = [
    EncodingConfig("mean", normalize=True, prompts={"query": "q: ", "passage": ""}, default_prompt_name="query"),
    EncodingConfig("cls", normalize=False, similarity="dot", max_seq_length=64),
    EncodingConfig("max", normalize=True, similarity="euclidean"),
    EncodingConfig("mean_sqrt_len", normalize=False, similarity="manhattan"),
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.pooling)
def test_the_encoding_comes_back_from_sentence_transformers_folders(checkpoint, tmp_path, encoding):
    folder = export_sentence_transformers(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    assert read_checkpoint(folder).encoding == encoding
    model = SentenceTransformer(str(folder), device="cpu")
    assert (model.similarity_fn_name, model.default_prompt_name) == (encoding.similarity, encoding.default_prompt_name)
    assert model.prompts.items() >= encoding.prompts.items()
    assert model[1].pooling_mode == {"mean_sqrt_len": "mean_sqrt_len_tokens"}.get(encoding.pooling, encoding.pooling)
    assert len(model) == (3 if encoding.normalize else 2)


@pytest.mark.parametrize(
    "encoding",
    [
        EncodingConfig("mean", "first_layer", normalize=True, max_seq_length=64),
        EncodingConfig("cls", "first_layer", normalize=False),
        EncodingConfig("avg_top2", "first_layer", normalize=False),
        EncodingConfig("avg_first_last", "first_layer", normalize=True),
    ],
    ids=lambda encoding: encoding.pooling,
)
def test_the_encoding_comes_back_from_modelscope_folders(checkpoint, tmp_path, encoding):
    folder = export_modelscope(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    assert read_checkpoint(folder).encoding == encoding


def test_sentence_transformers_computes_the_same_from_the_export(weights_folder, tmp_path):
    original = SentenceTransformer(str(weights_folder), device="cpu")
    original.max_seq_length = 128
    folder = export_sentence_transformers(read_checkpoint(weights_folder), tmp_path / "exported")
    exported = SentenceTransformer(str(folder), device="cpu")
    assert exported.max_seq_length == 128
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 128  # before version 6
    difference = np.abs(exported.encode(SENTENCES) - original.encode(SENTENCES)).max()
    assert difference <= 1e-6


def test_transformers_computes_the_same_from_a_modelscope_export(weights_folder, tmp_path):
    checkpoint = read_checkpoint(weights_folder)
    encoding = dataclasses.replace(checkpoint.encoding, pooling="mean", normalize=False)
    folder = export_modelscope(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    files = "config.json configuration.json pytorch_model.bin tokenizer.json tokenizer_config.json vocab.txt"
    assert sorted(path.name for path in folder.iterdir()) == files.split()
    assert (folder / "vocab.txt").read_bytes() == (weights_folder / "vocab.txt").read_bytes()
    model = BertModel.from_pretrained(folder).eval()
    assert model.config.output_hidden_states
    (folder / "tokenizer.json").unlink()  # vocab.txt must do, as in the folders that ModelScope users have
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True, truncation=True, max_length=128)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    ours = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    original = SentenceTransformer(str(weights_folder), device="cpu")
    original.max_seq_length = 128
    assert np.abs(ours.numpy() - original.encode(SENTENCES)).max() <= 1e-6


def test_modelscope_finds_all_its_configuration(checkpoint, tmp_path):
    encoding = EncodingConfig("avg_top2", normalize=True, max_seq_length=77)
    folder = export_modelscope(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    assert json.loads((folder / "configuration.json").read_text()) == {
        "framework": "pytorch",
        "task": "sentence-embedding",
        "pipeline": {"type": "sentence-embedding"},
        "model": {"type": "bert", "emb_pooler_type": "avg_top2", "normalize": True},
        "preprocessor": {"type": "sentence-embedding", "max_length": 77},
    }
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert all(name.startswith("bert.") for name in state)
    assert "bert.encoder.layer.1.attention.self.value.weight" in state
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in state.items()}
    assert all(sizes[name] == tensor.numel() * tensor.element_size() for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_loaded_as_half_precision(bert_folder, bert_state, tmp_path, dtype):
    state = {name: tensor if "_ids" in name else tensor.to(dtype) for name, tensor in bert_state.items()}
    folder = export_sentence_transformers(read_checkpoint(bert_folder(state=state)), tmp_path / "exported")
    assert SentenceTransformer(str(folder), device="cpu").dtype == dtype


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"strip_accents": False}], ids=str)
@pytest.mark.parametrize("lowercase", [True, False], ids=["ST lowercases", "ST does not"])
def test_tokenizers_other_than_the_default_survive(st_folder, tmp_path, settings, lowercase):
    """Of a sentence-transformers folder, read and exported, the real package makes the same tokens as before."""
    files = {"tokenizer_config.json": settings, "sentence_bert_config.json": {"do_lower_case": lowercase}}
    original = st_folder(files=files)
    exported = export_sentence_transformers(read_checkpoint(original), tmp_path / "exported")
    texts = ["Hello cat", "CAFÉ hellö café", "Hello, dogs!"]
    ids = [
        SentenceTransformer(str(folder), device="cpu").tokenize(texts)["input_ids"] for folder in (original, exported)
    ]
    assert torch.equal(*ids)


def test_a_tokenizer_of_another_kind(checkpoint, tmp_path):
    values = json.loads(checkpoint.tokenizer_json) | {"normalizer": {"type": "Lowercase"}}
    checkpoint = dataclasses.replace(checkpoint, tokenizer_json=json.dumps(values))
    with pytest.raises(WeightsError, match=r"cannot be written as BERT's vocab\.txt"):
        export_modelscope(checkpoint, tmp_path / "modelscope")
    folder = export_sentence_transformers(checkpoint, tmp_path / "st")
    assert not (folder / "vocab.txt").exists()
    assert json.loads(read_checkpoint(folder).tokenizer_json) == values
    tokenizer = SentenceTransformer(str(folder), device="cpu").tokenizer
    assert tokenizer.tokenize("CAFÉ") == ["café"]


@pytest.mark.parametrize(
    ("export", "changes", "message"),
    [
        (
            export_sentence_transformers,
            {"pooling": "avg_top2"},
            "sentence-transformers has no pooling avg_top2, only mean",
        ),
        (export_sentence_transformers, {"pooling": "avg_first_last"}, "has no pooling avg_first_last"),
        (export_modelscope, {"pooling": "max"}, "ModelScope has no pooling max, only cls, mean"),
        (export_modelscope, {"pooling": "mean_sqrt_len"}, "has no pooling mean_sqrt_len"),
        (export_modelscope, {"pooling": "avg_first_last"}, "set first_hidden_state='first_layer'"),
        (export_modelscope, {"prompts": {"q": "q: "}, "default_prompt_name": "q"}, "ModelScope has no prompts"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_what_the_other_format_cannot_say_is_an_error(checkpoint, tmp_path, export, changes, message):
    encoding = dataclasses.replace(checkpoint.encoding, **changes)
    with pytest.raises(WeightsError, match=message):
        export(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_prompts_left_out_of_a_modelscope_folder_are_reported(checkpoint, tmp_path, caplog):
    encoding = dataclasses.replace(checkpoint.encoding, prompts={"query": "q: "})
    export_modelscope(dataclasses.replace(checkpoint, encoding=encoding), tmp_path / "exported")
    assert "no place for the prompts" in caplog.text


@both
def test_a_folder_that_holds_something_is_left_alone(checkpoint, tmp_path, export):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(WeightsError, match=r"mine is not empty \(notes.txt\)"):
        export(checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    folder = export(checkpoint, tmp_path / "exported")
    with pytest.raises(WeightsError, match="exported is not empty"):
        export(checkpoint, folder)


@both
def test_an_empty_folder_and_missing_parents_are_fine(checkpoint, tmp_path, export):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert read_checkpoint(export(checkpoint, folder)).config == checkpoint.config


@both
def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, export, monkeypatch):
    def fill_the_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_json", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        export(checkpoint, tmp_path / "deep" / "exported")
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_licence_and_the_origin_travel_along(weights_folder, tmp_path):
    checkpoint = read_checkpoint(weights_folder)
    folder = export_sentence_transformers(checkpoint, tmp_path / "exported")
    assert read_checkpoint(folder).provenance["licence"] == "Apache-2.0"
    assert checkpoint.provenance["source_sha256"] in (folder / "README.md").read_text()


def test_a_card_travels_along(checkpoint, tmp_path):
    card = "---\nlicense: mit\n---\n\n# Ours\n"
    folder = export_sentence_transformers(dataclasses.replace(checkpoint, card=card), tmp_path / "exported")
    assert (folder / "README.md").read_text() == card
