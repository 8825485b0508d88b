"""Every tensor has one name; other names that mean it are understood, and wrong ones are answered helpfully."""

import pytest

from minilm import MiniLMConfig
from minilm.internals import UnknownPointError, points_of
from minilm.internals.points import resolve

CONFIG = MiniLMConfig()
SIX = range(6)

# What TransformerLens 2 calls the tensors of its HookedEncoder (bert_embed.py, bert_block.py, abstract_attention.py).
TRANSFORMER_LENS = {
    "hook_full_embed": "embeddings",
    "blocks.0.hook_resid_pre": "embeddings",
    "blocks.3.hook_resid_pre": "layers.2.output",
    "blocks.3.attn.hook_q": "layers.3.attention.query",
    "blocks.3.attn.hook_k": "layers.3.attention.key",
    "blocks.3.attn.hook_v": "layers.3.attention.value",
    "blocks.3.attn.hook_attn_scores": "layers.3.attention.scores",
    "blocks.3.attn.hook_pattern": "layers.3.attention.pattern",
    "blocks.3.attn.hook_z": "layers.3.attention.head_outputs",
    "blocks.3.hook_attn_out": "layers.3.attention.output",
    "blocks.3.hook_resid_mid": "layers.3.attention_residual",
    "blocks.3.mlp.hook_pre": "layers.3.feed_forward.pre_activation",
    "blocks.3.mlp.hook_post": "layers.3.feed_forward.activation",
    "blocks.3.hook_mlp_out": "layers.3.feed_forward.output",
    "blocks.3.hook_resid_post": "layers.3.feed_forward_residual",
    "blocks.3.hook_normalized_resid_post": "layers.3.output",
    "embed.hook_embed": "embeddings.word",
    "embed.hook_pos_embed": "embeddings.position",
    "embed.hook_token_type_embed": "embeddings.token_type",
    "blocks.3.ln1.hook_normalized": "layers.3.attention_norm",
    "blocks.3.ln2.hook_normalized": "layers.3.output",
}
WRONG = {
    "layers.3.outptu": "layers.3.output",
    "layers.3.attention.heads": "layers.3.attention.head_outputs",
    "blocks.9.attn.hook_q": "layers.5.attention.query",  # there are six layers
    "blocks.7.hook_resid_pre": "layers.",  # 6 would be what the sixth layer gives
    "Embedding": "embedding",
    "layers.*.atention.query": "layers.",
    "blocks.2.atn.hook_k": "layers.2.attention.key",
}


def names(wanted, config=CONFIG):
    return [point.name for point in resolve(wanted, config)]


def test_there_are_as_many_as_the_model_has_layers():
    assert len(points_of(CONFIG)) == 4 + 6 * 14 + 2
    assert len(points_of(MiniLMConfig(num_layers=2))) == 4 + 2 * 14 + 2
    assert all(name == point.name for name, point in points_of(CONFIG).items())


@pytest.mark.parametrize(("theirs", "ours"), TRANSFORMER_LENS.items())
def test_names_of_transformer_lens(theirs, ours):
    assert names(theirs) == [ours]


def test_every_point_of_a_layer_has_a_name_there():
    layer = {name for name in points_of(CONFIG) if name.startswith("layers.3.")}
    assert layer == {ours for ours in TRANSFORMER_LENS.values() if ours.startswith("layers.3.")}


def test_a_star_stands_for_anything():
    assert names("*") == list(points_of(CONFIG))
    assert names("layers.*.attention.query") == [f"layers.{k}.attention.query" for k in SIX]
    assert names("blocks.*.attn.hook_pattern") == [f"layers.{k}.attention.pattern" for k in SIX]
    assert names("layers.[02].attention.query") == ["layers.0.attention.query", "layers.2.attention.query"]


def test_a_star_is_one_part_of_a_name():
    assert names("layers.*.output") == [f"layers.{k}.output" for k in SIX]


def test_each_once_and_in_the_order_of_computation():
    wanted = ["embedding", "layers.2.output", "embeddings", "layers.0.output", "blocks.2.hook_normalized_resid_post"]
    assert names(wanted) == ["embeddings", "layers.0.output", "layers.2.output", "embedding"]
    assert names(iter(wanted)) == names(wanted)


@pytest.mark.parametrize(("wrong", "near"), WRONG.items())
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(UnknownPointError) as raised:
        resolve(["embeddings", wrong], CONFIG)
    first = str(raised.value).split("did you mean ")[1].split(" or ")[0]
    assert repr(wrong) in str(raised.value)
    assert first.rstrip("?").startswith(near)


def test_a_name_near_none_is_told_where_all_are():
    with pytest.raises(UnknownPointError, match=r"'zzz'; `minilm internals points` lists them"):
        resolve("zzz", CONFIG)
    assert issubclass(UnknownPointError, ValueError)
