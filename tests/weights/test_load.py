"""Every layout that is read: sentence-transformers of all versions, ModelScope, plain BERT, shards and pickles."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import BertModel, BertTokenizerFast

from minilm.config import EncodingConfig, MiniLMConfig
from minilm.weights.convert import to_bert
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_the_real_folder(weights_folder):
    checkpoint = read_checkpoint(weights_folder, source="sentence-transformers/all-MiniLM-L6-v2")
    assert checkpoint.config == MiniLMConfig()
    assert checkpoint.encoding == EncodingConfig(
        pooling="mean", normalize=True, max_seq_length=128, similarity="cosine"
    )
    digest = hashlib.sha256((weights_folder / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.provenance.pop("converted_with").startswith("minilm ")
    assert checkpoint.provenance == {
        "source": "sentence-transformers/all-MiniLM-L6-v2",
        "source_format": "sentence-transformers",
        "source_sha256": digest,
        "source_max_seq_length": 256,
        "licence": "Apache-2.0",
    }
    assert checkpoint.ignored == ()
    assert equal(to_bert(checkpoint.tensors, checkpoint.config), load_file(weights_folder / "model.safetensors"))


def test_what_sentence_transformers_itself_saves(weights_folder, tmp_path):
    model = SentenceTransformer(str(weights_folder), device="cpu", similarity_fn_name="dot")
    model.prompts, model.default_prompt_name = {"query": "find: ", "empty": ""}, "query"
    model.max_seq_length = 200
    model.save(str(tmp_path / "saved"))
    saved, original = read_checkpoint(tmp_path / "saved"), read_checkpoint(weights_folder)
    assert saved.encoding.prompts.items() >= {"query": "find: ", "empty": ""}.items()
    assert (saved.encoding.default_prompt_name, saved.encoding.similarity) == ("query", "dot")
    assert (saved.encoding.pooling, saved.encoding.normalize, saved.encoding.max_seq_length) == ("mean", True, 200)
    assert saved.provenance["source_max_seq_length"] == 200
    assert equal(saved.model_tensors, original.model_tensors)
    assert json.loads(saved.tokenizer_json) == json.loads(original.tokenizer_json)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean_sqrt_len_tokens"], "include_prompt": True}, "mean_sqrt_len"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"word_embedding_dimension": 32}, "mean"),
    ],
    ids=str,
)
def test_pooling_of_old_and_new_sentence_transformers(st_folder, pooling, expected):
    assert read_checkpoint(st_folder(pooling)).encoding.pooling == expected


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode": "lasttoken"}, "asks for pooling lasttoken; expected one of"),
        ({"pooling_mode": 3}, "asks for pooling 3"),
        ({"pooling_mode": ["cls", "mean"]}, "asks for pooling cls and mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "asks for pooling mean and max"),
        ({"pooling_mode_weightedmean_tokens": True}, "asks for pooling weightedmean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt=false"),
        ({"pooling_mode": "mean", "embedding_dimension": 64}, "pools vectors of 64, config.json's hidden_size is 32"),
    ],
    ids=str,
)
def test_poolings_we_do_not_have_are_refused(st_folder, pooling, message):
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(st_folder(pooling))


NEW_TYPES = (
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "sentence_transformers.base.modules.normalize.Normalize",
)


@pytest.mark.parametrize(
    ("modules", "normalize"),
    [(("Transformer", "Pooling"), False), (("Transformer", "Pooling", "Normalize"), True), (NEW_TYPES, True)],
    ids=["no Normalize", "old", "new"],
)
def test_module_lists(st_folder, modules, normalize):
    assert read_checkpoint(st_folder(modules=modules)).encoding.normalize is normalize


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (("Transformer", "Pooling", "Normalize", "Dense"), "Transformer, Pooling, Normalize, Dense"),
        (("Transformer", "Pooling", "somebody.Normalize"), "somebody.Normalize"),
        (("Transformer",), "Transformer"),
        (("StaticEmbedding", "Normalize"), "StaticEmbedding"),
    ],
    ids=str,
)
def test_other_modules_are_named_and_refused(st_folder, modules, named):
    with pytest.raises(WeightsError, match=rf"lists .*{named}.*Another module would be left out"):
        read_checkpoint(st_folder(modules=modules))


def test_the_transformer_may_have_a_folder_of_its_own(st_folder):
    files = {"0_Transformer/sentence_bert_config.json": {"max_seq_length": 99, "do_lower_case": True}}
    files["0_Transformer/tokenizer_config.json"] = {"do_lower_case": False}
    checkpoint = read_checkpoint(st_folder(path="0_Transformer", files=files))
    assert checkpoint.encoding.max_seq_length == checkpoint.provenance["source_max_seq_length"] == 99
    normalizer = json.loads(checkpoint.tokenizer_json)["normalizer"]
    assert (normalizer["lowercase"], normalizer["strip_accents"]) == (True, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, "must be sentence_embedding"),
        ({"config_sentence_transformers.json": {"truncate_dim": 16}}, "truncate_dim=16"),
        ({"config_sentence_transformers.json": {"similarity_fn_name": "maxsim"}}, "similarity must be one of"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "not a known prompt"),
        ({"config_sentence_transformers.json": {"prompts": ["q"]}}, "prompts must map names to texts"),
        ({"modules.json": {"0": "Transformer"}}, "not a list of modules"),
    ],
    ids=str,
)
def test_settings_we_do_not_have_are_refused(st_folder, files, message):
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(st_folder(files=files))


def test_a_plain_bert_folder_is_read_as_sentence_transformers_does(bert_folder, bert_state, caplog):
    folder = bert_folder(state={name: t for name, t in bert_state.items() if "position_ids" not in name})
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    with caplog.at_level(logging.INFO):
        checkpoint = read_checkpoint(folder)
    modules = [type(module).__name__ for module in SentenceTransformer(str(folder), device="cpu")]
    assert modules == ["Transformer", "Pooling"]
    assert (checkpoint.encoding.pooling, checkpoint.encoding.normalize) == ("mean", False)
    assert checkpoint.provenance["source_format"] == "bert"
    assert checkpoint.provenance["licence"] == "unknown"
    assert "mean pooling without normalisation" in caplog.text


@pytest.mark.parametrize(("positions", "limit"), [(160, 128), (100, 100)])
def test_the_default_length_is_limited_to_the_positions(bert_folder, bert_state, positions, limit, caplog):
    bert_state["embeddings.position_embeddings.weight"] = torch.ones(positions, 32)
    del bert_state["embeddings.position_ids"]
    checkpoint = read_checkpoint(bert_folder(state=bert_state, max_position_embeddings=positions))
    assert checkpoint.encoding.max_seq_length == limit
    assert ("limited to the model's 100 positions" in caplog.text) == (positions == 100)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n", "Apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", "MIT"),
        ("---\nlicense: openrail++\n---\n", "openrail++"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "unknown"),
        ("license: mit\n", "unknown"),
    ],
)
def test_the_licence_comes_from_the_model_card(st_folder, readme, licence):
    folder = st_folder(path="0_Transformer")
    (folder / "README.md").write_text(readme)
    assert read_checkpoint(folder).provenance["licence"] == licence


# ModelScope


@pytest.mark.parametrize(
    ("model", "pooling", "normalize"),
    [
        ({"type": "bert"}, "cls", False),
        ({"type": "bert", "emb_pooler_type": "cls", "normalize": True}, "cls", True),
        ({"type": "bert", "emb_pooler_type": "avg"}, "mean", False),
        ({"type": "bert", "emb_pooler_type": "avg_top2"}, "avg_top2", False),
        ({"model_type": "bert", "emb_pooler_type": "avg_first_last"}, "avg_first_last", False),
        ({"type": "bert", "pooler_type": "avg"}, "cls", False),
    ],
    ids=str,
)
def test_modelscope_poolers(modelscope_folder, model, pooling, normalize):
    checkpoint = read_checkpoint(modelscope_folder(model))
    assert checkpoint.encoding == EncodingConfig(pooling, "first_layer", normalize, 128)
    assert checkpoint.provenance["source_format"] == "modelscope"


@pytest.mark.parametrize("pooler", ["mean", "max", "pooler", "cls_before_pooler", None, ["cls"]], ids=str)
def test_unknown_modelscope_poolers_are_refused(modelscope_folder, pooler):
    with pytest.raises(WeightsError, match="emb_pooler_type must be one of cls, avg, avg_top2, avg_first_last; got"):
        read_checkpoint(modelscope_folder({"type": "bert", "emb_pooler_type": pooler}))


@pytest.mark.parametrize(
    ("preprocessor", "limit"),
    [
        (None, 128),
        ({}, 128),
        ({"type": "sentence-embedding"}, 128),
        ({"type": "sentence-embedding", "max_length": 64}, 64),
        ({"type": "sentence-embedding", "max_length": None}, 128),
        ({"type": "sentence-embedding", "sequence_length": 64}, 128),
        ({"train": {"type": "x", "max_length": 33}, "val": {"type": "x", "max_length": 44}}, 44),
        ({"type": "sentence-embedding", "max_length": 600}, 160),
        ({"max_length": 50}, 50),
    ],
    ids=str,
)
def test_modelscope_preprocessors(modelscope_folder, preprocessor, limit):
    assert read_checkpoint(modelscope_folder(preprocessor=preprocessor)).encoding.max_seq_length == limit


@pytest.mark.parametrize(
    ("model", "preprocessor", "message"),
    [
        ({"type": "roberta"}, None, "model.type must be 'bert', got 'roberta'"),
        ({"type": "bert"}, {"type": "x", "boq": "query: "}, "adds boq to texts"),
        ({"type": "bert"}, {"type": "x", "max_length": 2}, "max_seq_length must be an integer of at least 3"),
        ({"type": "bert"}, {"type": "x", "max_length": "64"}, "max_seq_length must be an integer"),
        ("bert", None, "must be JSON objects"),
    ],
    ids=str,
)
def test_modelscope_settings_we_do_not_have_are_refused(modelscope_folder, model, preprocessor, message):
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(modelscope_folder(model, preprocessor))


def test_modelscope_training_checkpoints(modelscope_folder, bert_state):
    extras = {
        f"{name}.weight": torch.ones(2) for name in ("decoder.layer.0", "encoder_ln1", "encoder_ln2", "mlp.dense")
    }
    checkpoint = read_checkpoint(modelscope_folder(state=bert_state | extras))
    assert checkpoint.ignored == tuple(f"bert.{name}" for name in extras)
    assert equal(to_bert(checkpoint.tensors, checkpoint.config), bert_state)


def test_a_mirror_on_modelscope_keeps_its_layout(st_folder):
    folder = st_folder(files={"configuration.json": {"framework": "pytorch", "task": "sentence-embedding"}})
    assert read_checkpoint(folder).provenance["source_format"] == "sentence-transformers"


GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = ("seed_example", "seed_apostrophe", "two_sources_only")


def test_modelscope_weights_give_what_modelscope_computed(weights_folder, tmp_path):
    """Vectors of modelscope's own pipeline, computed again by transformers from what was read."""
    golden = np.load(GOLDEN / "inference_avg.npz")
    cases = json.loads((GOLDEN / "inference_inputs.json").read_text(encoding="utf-8"))["cases"]
    state = load_file(weights_folder / "model.safetensors")
    folder = tmp_path / "modelscope"
    folder.mkdir()
    state = {f"bert.{name}": tensor for name, tensor in state.items() if "pooler" not in name}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_bytes((weights_folder / "vocab.txt").read_bytes())
    config = json.loads((weights_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_hidden_states": True}))
    model = {"type": "bert", "emb_pooler_type": "avg"}
    (folder / "configuration.json").write_text(json.dumps({"task": "sentence-embedding", "model": model}))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.encoding == EncodingConfig("mean", "first_layer", normalize=False)
    for name in GOLDEN_CASES:
        texts = [*cases[name]["source_sentence"], *cases[name].get("sentences_to_compare", [])]
        np.testing.assert_allclose(mean_pooled(checkpoint, texts), golden[name], rtol=0, atol=2e-6)


def mean_pooled(checkpoint, texts):
    """Mean-pooled vectors by transformers' own BertModel, from a checkpoint's tensors and tokenizer."""
    from tokenizers import Tokenizer
    from transformers import BertConfig

    from minilm.weights.convert import config_to_bert

    model = BertModel(BertConfig(**config_to_bert(checkpoint.config, torch.float32)), add_pooling_layer=False).eval()
    state = to_bert(checkpoint.model_tensors, checkpoint.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    with torch.no_grad():
        hidden = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0] for text in texts]
    return np.stack([states.mean(0).numpy() for states in hidden])


# Files


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_file_itself_may_be_named(bert_folder, bert_state, weights):
    folder = bert_folder(weights=weights)
    named = read_checkpoint(folder / weights)
    assert equal(to_bert(named.tensors, named.config), bert_state)
    assert named.provenance["source"] == "bert"


def test_another_weights_file_of_the_folder_may_be_named(bert_folder, bert_state):
    folder = bert_folder()
    changed = bert_state | {"pooler.dense.bias": torch.full((32,), 7.0)}
    save_file(changed, folder / "epoch-3.safetensors")
    named = read_checkpoint(folder / "epoch-3.safetensors")
    assert named.tensors["pooler.bias"].tolist() == [7.0] * 32
    assert (
        named.provenance["source_sha256"] == hashlib.sha256((folder / "epoch-3.safetensors").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_of_tensors_are_read(bert_folder, bert_state, zipped):
    folder = bert_folder(weights=None)
    torch.save(bert_state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(folder)
    assert equal(to_bert(checkpoint.tensors, checkpoint.config), bert_state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_joined(bert_folder, bert_state, suffix):
    folder = bert_folder(weights=None)
    names = sorted(bert_state)
    shards = {f"model-0000{number + 1}-of-00003.{suffix}": names[number::3] for number in range(3)}
    digest = hashlib.sha256()
    for shard, held in shards.items():
        state = {name: bert_state[name] for name in held}
        if suffix == "bin":
            torch.save(state, folder / shard)
        else:
            save_file(state, folder / shard)
        digest.update((folder / shard).read_bytes())
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    stem = "pytorch_model" if suffix == "bin" else "model"
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    checkpoint = read_checkpoint(folder)
    assert equal(to_bert(checkpoint.tensors, checkpoint.config), bert_state)
    assert checkpoint.provenance["source_sha256"] == digest.hexdigest()
    (folder / f"model-00002-of-00003.{suffix}").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003.*is missing"):
        read_checkpoint(folder)


def test_safetensors_are_preferred_to_a_pickle(bert_folder, bert_state):
    folder = bert_folder()
    (folder / "pytorch_model.bin").write_bytes(b"never looked at")
    checkpoint = read_checkpoint(folder)
    assert equal(to_bert(checkpoint.tensors, checkpoint.config), bert_state)
