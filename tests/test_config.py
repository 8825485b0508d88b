"""Sizes and settings: what is refused, and that nothing is lost on the way through a dictionary."""

import dataclasses
import json

import pytest

from minilm.config import EncodingConfig, MiniLMConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"num_layers": 2.0}, "num_layers must be a positive integer, got 2.0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
        ({"num_heads": 5}, "num_heads must divide hidden_size, got 5 heads for 384"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"layer_norm_eps": "1e-12"}, r"layer_norm_eps must be a number in \[0, 1\), got '1e-12'"),
        ({"pad_token_id": -1}, "pad_token_id must be a row of the vocabulary, got -1"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must be a number in \[0, 1\)"),
    ],
)
def test_model_sizes_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        MiniLMConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "avg"}, "pooling must be one of mean, cls, max"),
        ({"first_hidden_state": "second"}, "first_hidden_state must be one of embeddings, first_layer"),
        ({"similarity": "jaccard"}, "similarity must be one of cosine, dot"),
        ({"max_seq_length": 2}, "max_seq_length must be an integer of at least 3"),
        ({"default_prompt_name": "query"}, "default_prompt_name 'query' is not a known prompt"),
    ],
)
def test_encoding_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        EncodingConfig(**change)


@pytest.mark.parametrize(
    "config",
    [MiniLMConfig(num_layers=3), EncodingConfig(pooling="cls", prompts={"query": "q: "}, default_prompt_name="query")],
    ids=["model", "encoding"],
)
def test_round_trip_through_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="MiniLMConfig has no field depth"):
        MiniLMConfig.from_dict({"depth": 6})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MiniLMConfig().num_layers = 12
