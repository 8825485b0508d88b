"""Names, shapes and configuration: BERT's to ours and back, and everything that can be wrong with them."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from minilm.config import MiniLMConfig
from minilm.weights.convert import check_canonical, config_from_bert, config_to_bert, from_bert, to_bert
from minilm.weights.files import WeightsError
from minilm.weights.names import OPTIONAL, plain_name, tensor_names

WHERE = Path("somewhere/model.safetensors")


@pytest.fixture
def config(bert_config):
    return config_from_bert(bert_config, WHERE)


def same(tensors, others):
    """Whether two dictionaries hold the same names, and bit for bit the same tensors."""
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name]) for name in tensors
    )


def test_every_tensor_lands_where_the_contract_says(bert_state, config):
    tensors, ignored = from_bert(bert_state, config, WHERE)
    layer = "encoder.layer.1."
    by_hand = {
        "embeddings.word.weight": "embeddings.word_embeddings.weight",
        "embeddings.position.weight": "embeddings.position_embeddings.weight",
        "embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
        "embeddings.norm.weight": "embeddings.LayerNorm.weight",
        "embeddings.norm.bias": "embeddings.LayerNorm.bias",
        "layers.1.attention.output.weight": layer + "attention.output.dense.weight",
        "layers.1.attention.output.bias": layer + "attention.output.dense.bias",
        "layers.1.attention_norm.weight": layer + "attention.output.LayerNorm.weight",
        "layers.1.attention_norm.bias": layer + "attention.output.LayerNorm.bias",
        "layers.1.feed_forward.intermediate.weight": layer + "intermediate.dense.weight",
        "layers.1.feed_forward.intermediate.bias": layer + "intermediate.dense.bias",
        "layers.1.feed_forward.output.weight": layer + "output.dense.weight",
        "layers.1.feed_forward.output.bias": layer + "output.dense.bias",
        "layers.1.feed_forward_norm.weight": layer + "output.LayerNorm.weight",
        "layers.1.feed_forward_norm.bias": layer + "output.LayerNorm.bias",
        "pooler.weight": "pooler.dense.weight",
        "pooler.bias": "pooler.dense.bias",
        "embeddings.position_ids": "embeddings.position_ids",
    }
    for ours, theirs in by_hand.items():
        assert torch.equal(tensors[ours], bert_state[theirs]), ours
    for part in ("weight", "bias"):
        stacked = [bert_state[f"{layer}attention.self.{name}.{part}"] for name in ("query", "key", "value")]
        assert torch.equal(tensors[f"layers.1.attention.qkv.{part}"], torch.cat(stacked))
    assert set(tensors) == {*by_hand, *(row.ours for row in tensor_names(config) if "layers." in row.ours)}
    assert len(tensors) == 5 + 2 * 12 + 3
    assert ignored == ()


@pytest.mark.parametrize(
    "optional", [(), ("pooler",), ("embeddings.position_ids",), ("pooler", "embeddings.position_ids")]
)
def test_converting_and_back_is_exact(bert_state, config, optional):
    source = {name: tensor for name, tensor in bert_state.items() if not name.startswith(optional or "nothing")}
    tensors, _ = from_bert(source, config, WHERE)
    assert same(to_bert(tensors, config), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(bert_state, config, dtype):
    source = {name: tensor if "_ids" in name else tensor.to(dtype) for name, tensor in bert_state.items()}
    tensors, _ = from_bert(source, config, WHERE)
    assert {tensor.dtype for name, tensor in tensors.items() if "_ids" not in name} == {dtype}
    assert same(to_bert(tensors, config), source)


@pytest.mark.parametrize(
    "prefix",
    [
        "bert.",
        "module.",
        "module.bert.",
        "encoder.",
        "module.encoder.bert.",
        "encoder.module.",
        "0.auto_model.",
        "model.",
    ],
)
def test_wrapper_prefixes_are_understood(bert_state, config, prefix):
    tensors, _ = from_bert({prefix + name: tensor for name, tensor in bert_state.items()}, config, WHERE)
    assert same(tensors, from_bert(bert_state, config, WHERE)[0])


def test_gamma_and_beta_are_understood(bert_state, config):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in bert_state.items()
    }
    assert old.keys() != bert_state.keys()
    assert same(from_bert(old, config, WHERE)[0], from_bert(bert_state, config, WHERE)[0])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("encoder.layer.0.output.dense.bias", "encoder.layer.0.output.dense.bias"),
        ("encoder.encoder.layer.0.output.dense.bias", "encoder.layer.0.output.dense.bias"),
        ("bert.pooler.dense.weight", "pooler.dense.weight"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("teacher.bert.pooler.dense.weight", "teacher.bert.pooler.dense.weight"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


LEFTOVERS = (
    "cls.predictions.bias",
    "cls.seq_relationship.weight",
    "decoder.layer.0.attention.self.query.weight",
    "encoder_ln1.weight",
    "encoder_ln2.bias",
    "mlp.dense.weight",
    "mlp_head.0.bias",
)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_training_leftovers_are_left_out_and_reported(bert_state, config, caplog, prefix):
    leftovers = {prefix + name: torch.ones(3) for name in LEFTOVERS}
    tensors, ignored = from_bert(bert_state | leftovers, config, WHERE)
    assert ignored == tuple(leftovers)
    assert same(tensors, from_bert(bert_state, config, WHERE)[0])
    assert all(name in caplog.text for name in leftovers)


def test_everything_wrong_is_listed_in_one_error(bert_state, config):
    del bert_state["encoder.layer.0.attention.self.key.bias"], bert_state["embeddings.LayerNorm.weight"]
    bert_state["classifier.weight"] = torch.ones(2, 32)
    bert_state["encoder.layer.2.output.dense.bias"] = torch.ones(32)
    bert_state["embeddings.word_embeddings.weight"] = torch.ones(7, 32)
    bert_state["encoder.layer.1.output.dense.weight"] = torch.ones(32, 47)
    bert_state["encoder.layer.1.output.dense.bias"] = torch.ones(32, dtype=torch.int8)
    bert_state["encoder.layer.1.output.LayerNorm.bias"][5] = float("nan")
    bert_state["encoder.layer.1.output.LayerNorm.weight"][0] = float("-inf")
    bert_state["embeddings.position_ids"][0, 3] = 4
    bert_state["bert.pooler.dense.bias"] = torch.ones(32)
    bert_state["encoder.layer.0.attention.self.query.weight"] = torch.ones(32, 32, dtype=torch.float16)
    with pytest.raises(WeightsError) as caught:
        from_bert(bert_state, config, WHERE)
    query_key_value = ", ".join(f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value"))
    assert str(caught.value).splitlines()[1:-1] == [
        "  missing (2): embeddings.LayerNorm.weight, encoder.layer.0.attention.self.key.bias",
        "  unexpected (2): classifier.weight, encoder.layer.2.output.dense.bias",
        "  misshapen (2): embeddings.word_embeddings.weight is [7, 32], expected [41, 32], "
        "encoder.layer.1.output.dense.weight is [32, 47], expected [32, 48]",
        "  of a wrong dtype (1): encoder.layer.1.output.dense.bias is torch.int8",
        "  with wrong values (NaN, infinite, or not positions) (3): encoder.layer.1.output.LayerNorm.weight, "
        "encoder.layer.1.output.LayerNorm.bias, embeddings.position_ids",
        "  stored twice (1): bert.pooler.dense.bias",
        f"  of different dtypes (1): {query_key_value}",
    ]
    assert str(WHERE) in str(caught.value)


def test_a_sum_that_overflows_is_not_mistaken_for_infinite_values(bert_state, config):
    bert_state["embeddings.word_embeddings.weight"].fill_(3e38)
    tensors, _ = from_bert(bert_state, config, WHERE)
    assert tensors["embeddings.word.weight"].sum().isinf()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"vocab_size": 40},
        {"max_position_embeddings": 512},
        {"type_vocab_size": 1},
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors_is_an_error(bert_state, bert_config, change):
    config = config_from_bert(bert_config | change, WHERE)
    with pytest.raises(WeightsError, match=r"missing|unexpected|misshapen"):
        from_bert(bert_state, config, WHERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act must be 'gelu', got 'gelu_new'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"num_attention_heads": 5}, "num_heads must divide hidden_size"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, got '32'"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a number"),
    ],
    ids=str,
)
def test_a_model_we_cannot_run_is_refused(bert_config, change, message):
    with pytest.raises(WeightsError, match=message):
        config_from_bert(bert_config | change, Path("folder/config.json"))


def test_a_config_without_sizes_names_them(bert_config):
    bert_config = dict(bert_config)
    del bert_config["num_attention_heads"], bert_config["hidden_size"]
    with pytest.raises(WeightsError, match="does not say hidden_size, num_attention_heads"):
        config_from_bert(bert_config, WHERE)


def test_the_config_agrees_with_transformers_in_both_directions():
    ours = MiniLMConfig(100, 24, 3, 4, 40, 64, 1, 1e-7, 0.2, 0.3, pad_token_id=5)
    theirs = BertConfig(**config_to_bert(ours, torch.float16))
    assert (theirs.num_hidden_layers, theirs.intermediate_size, theirs.layer_norm_eps) == (3, 40, 1e-7)
    assert (theirs.hidden_dropout_prob, theirs.attention_probs_dropout_prob, theirs.pad_token_id) == (0.2, 0.3, 5)
    assert theirs.dtype == torch.float16
    assert config_from_bert(theirs.to_dict(), WHERE) == ours
    assert config_from_bert(
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536).to_dict(), WHERE
    ) == (MiniLMConfig())


def test_check_canonical_lists_what_is_wrong_in_our_names(bert_state, config):
    tensors, _ = from_bert(bert_state, config, WHERE)
    check_canonical({name: tensor for name, tensor in tensors.items() if name not in OPTIONAL}, config, "a model")
    del tensors["layers.0.attention.qkv.weight"]
    with pytest.raises(WeightsError, match=r"a model(.|\n)*missing \(1\): layers.0.attention.qkv.weight"):
        check_canonical(tensors, config, "a model")
