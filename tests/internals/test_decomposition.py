from dataclasses import replace

import numpy as np
import pytest
import torch

from minilm.config import POOLINGS
from minilm.internals import ablate, capture, patch
from minilm.internals.decomposition import decompose, decompose_pair

PAIRS = [
    ("A man is eating a big piece of bread.", "Someone is having food at the table."),
    ("A plane is taking off.", "An air plane is taking off."),
    ("A girl plays the flute on stage.", "A man is riding a horse."),
    ("The cat is not on the mat.", "The cat is on the mat."),
    ("Two dogs run through deep snow.", "Dogs are playing outside in winter."),
    ("He said nothing at all.", "The company reported a loss for the year."),
]
FIRST, SECOND = PAIRS[0]
HEADS = [f"layers.{layer}.attention.heads.{head}" for layer in range(6) for head in range(12)]
FEED_FORWARDS = [f"layers.{layer}.feed_forward" for layer in range(6)]


def cosine(encoder, first, second):
    a, b = encoder.encode([first, second]).astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_sum_is_the_score(encoder, pair):
    result = decompose_pair(encoder, *pair)
    expected = cosine(encoder, *pair)
    assert result.by_component.shape == (106, 106)
    assert float(result.by_component.sum()) == pytest.approx(expected, abs=1e-6)
    assert float(result.by_token.sum()) == pytest.approx(expected, abs=1e-6)
    assert result.score == pytest.approx(expected, abs=1e-6)
    assert abs(result.residual) < 1e-6
    vectors = torch.from_numpy(encoder.encode(pair)).double()
    for side, vector in zip((result.first, result.second), vectors, strict=True):
        assert side.by_component.sum(dim=0) == pytest.approx(vector, abs=1e-6)
        assert side.residual < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", [*POOLINGS, "avg_first_last:first_layer"])
def test_every_pooling_is_exact(own_encoder, pooling, normalize):
    name, _, first = pooling.partition(":")
    settings = {"pooling": name, "first_hidden_state": first or "embeddings", "normalize": normalize}
    own_encoder.encoding = replace(own_encoder.encoding, **settings)
    vectors = torch.from_numpy(own_encoder.encode([FIRST, SECOND])).double()
    size = float(vectors.norm(dim=1).max())
    cosine_sum = decompose_pair(own_encoder, FIRST, SECOND)
    assert float(cosine_sum.by_component.sum()) == pytest.approx(cosine(own_encoder, FIRST, SECOND), abs=1e-6)
    dot_sum = decompose_pair(own_encoder, FIRST, SECOND, "dot")
    assert float(dot_sum.by_token.sum()) == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6 * size**2)
    assert dot_sum.first.by_token.sum(dim=0) == pytest.approx(vectors[0], abs=1e-6 * size)


def test_components(encoder):
    result = decompose(encoder, FIRST)
    assert len(set(result.components)) == len(result.components) == 106
    assert {*HEADS, *FEED_FORWARDS} < set(result.components)
    parameters = {name for name, _ in encoder.model.named_parameters() if name.endswith(".bias")}
    parameters = {name for name in parameters if "qkv" not in name and "intermediate" not in name}
    assert parameters == {name for name in result.components if name.endswith(".bias")}
    assert [result.components[result.index(name)] for name in HEADS] == HEADS
    with pytest.raises(ValueError, match=r"did you mean layers\.3\.feed_forward"):
        result.index("layers.3.feedforward")


def test_tokens_are_the_last_hidden_states(encoder):
    result = decompose(encoder, FIRST)
    (states,) = encoder.encode([FIRST], output_value="token_embeddings")
    pooled = states.double().mean(dim=0)
    assert result.tokens == encoder.tokenizer.tokens(encoder.tokenizer(FIRST).ids)
    assert result.by_token == pytest.approx(states.double() / len(states) / pooled.norm(), abs=1e-6)


def test_each_component_followed_by_hand(encoder):
    """Token by token, through LayerNorms whose mean and deviation come from the model's own residual sums."""
    result, captured = decompose(encoder, FIRST), capture(encoder, FIRST)
    residuals = ["embeddings", *(f"layers.{k}.{which}" for k in range(6) for which in ("attention", "feed_forward"))]
    norms = {f"{name}_norm".replace("embeddings_", "embeddings."): f"{name}_residual" for name in residuals}
    modules = dict(encoder.model.named_modules())

    def follow(vector, token, first):
        names = list(norms)
        for name in names[names.index(first) :]:
            if name == "embeddings.norm":
                parts = ("embeddings.word", "embeddings.position", "embeddings.token_type")
                actual = sum(captured[part][0][token].double() for part in parts)
            else:
                actual = captured[norms[name]][0][token].double()
            deviation = ((actual - actual.mean()) ** 2).mean().sqrt()
            vector = modules[name].weight.detach().double() * (vector - vector.mean()) / deviation
        return vector / len(result.tokens) / captured["pooled"][0].double().norm()

    heads = captured["layers.3.attention.head_outputs"][0].double()
    output = encoder.model.layers[3].attention.output
    feed_forward = captured["layers.2.feed_forward.output"][0].double()
    bias = encoder.model.layers[2].feed_forward.output.bias.detach().double()
    shift = encoder.model.layers[4].attention_norm.bias.detach().double()
    for token in (0, 4, len(result.tokens) - 1):
        head = output.weight.detach().double()[:, 5 * 32 : 6 * 32] @ heads[token, 5]
        expected = {
            "embeddings.word": follow(captured["embeddings.word"][0][token].double(), token, "embeddings.norm"),
            "layers.3.attention.heads.5": follow(head, token, "layers.3.attention_norm"),
            "layers.3.attention.output.bias": follow(output.bias.detach().double(), token, "layers.3.attention_norm"),
            "layers.2.feed_forward": follow(feed_forward[token] - bias, token, "layers.2.feed_forward_norm"),
            "layers.2.feed_forward.output.bias": follow(bias, token, "layers.2.feed_forward_norm"),
            "layers.4.attention_norm.bias": follow(shift, token, "layers.4.feed_forward_norm"),
        }
        for name, vector in expected.items():
            assert result.contributions[result.index(name), token] == pytest.approx(vector, abs=1e-9), name
    last = encoder.model.layers[5].feed_forward_norm.bias.detach().double()
    scaled = last / captured["pooled"][0].double().norm()
    assert result.by_component[result.index("layers.5.feed_forward_norm.bias")] == pytest.approx(scaled, abs=1e-9)


def test_direct_path_is_the_contribution_of_what_was_written(encoder):
    result = decompose(encoder, FIRST)
    name = "layers.4.attention.heads.7"
    heads = capture(encoder, FIRST, "layers.4.attention.head_outputs")["layers.4.attention.head_outputs"][0]
    write = heads[:, 7] @ encoder.model.layers[4].attention.output.weight.detach()[:, 7 * 32 : 8 * 32].T
    assert result.direct_path(name, write) == pytest.approx(result.contributions[result.index(name)], abs=1e-7)
    everywhere = result.direct_path(name, write[2])
    assert everywhere[2] == pytest.approx(result.contributions[result.index(name), 2], abs=1e-7)
    assert everywhere[3].norm() > 0
    with pytest.raises(ValueError, match=r"has shape \[12, 384\], got \[5, 384\]"):
        result.direct_path(name, write[:5])


@pytest.mark.parametrize("pooling", ["mean", "avg_top2"])
def test_direct_paths_of_biases(own_encoder, pooling):
    own_encoder.encoding = replace(own_encoder.encoding, pooling=pooling)
    result = decompose(own_encoder, FIRST)
    biases = {name: bias.detach() for name, bias in own_encoder.model.named_parameters() if name in result.components}
    assert len(biases) == 25
    for name, bias in biases.items():
        expected = result.contributions[result.index(name)]
        assert result.direct_path(name, bias) == pytest.approx(expected, abs=1e-9), name


def test_patches_in_force_are_seen(encoder):
    with ablate(encoder, "layers.4.attention.head_outputs", head=7):
        result = decompose_pair(encoder, FIRST, SECOND)
    assert not result.first.contributions[result.first.index("layers.4.attention.heads.7")].any()
    assert abs(result.residual) < 1e-6
    with patch(encoder, "layers.3.output", lambda x: x + 0.1 * x.flip(-1)):
        broken = decompose_pair(encoder, FIRST, SECOND)
    assert broken.first.residual > 1e-3  # a sum that the model did not make is reported


def correlation(predicted, actual):
    return float(np.corrcoef(predicted.flatten(), actual.flatten())[0, 1])


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_direct_contributions_predict_ablations_of_the_last_layers(encoder, own_sentences, how):
    texts = [text for pair in PAIRS for text in pair]
    decompositions = [decompose_pair(encoder, *pair) for pair in PAIRS]
    lent = capture(encoder, own_sentences[:8], ["layers.*.attention.head_outputs", "layers.*.feed_forward.output"])

    def place(name):
        layer, head = int(name.split(".")[1]), int(name.split(".")[-1]) if "heads" in name else None
        point = f"layers.{layer}.feed_forward.output" if head is None else f"layers.{layer}.attention.head_outputs"
        return layer, head, point

    def mean_write(name):
        layer, head, point = place(name)
        mean, block = lent[point].packed.mean(dim=0), encoder.model.layers[layer]
        if head is None:
            return mean - block.feed_forward.output.bias.detach()
        return block.attention.output.weight.detach().unflatten(1, (12, 32))[:, head] @ mean[head]

    def predicted(pair, name):
        if how == "zero":
            return float(pair.predicted_effects[pair.first.index(name)])
        sides = []
        for side in (pair.first, pair.second):
            replaced = side.direct_path(name, mean_write(name)).sum(dim=0)
            sides.append(side.embedding - side.by_component[side.index(name)] + replaced)
        return float(torch.cosine_similarity(*sides, dim=0)) - pair.score

    def actual(name):
        _, head, point = place(name)
        with ablate(encoder, point, how, head=head, source=None if how == "zero" else own_sentences[:8]):
            vectors = capture(encoder, texts, "embedding").embeddings.double()
        return (vectors[::2] * vectors[1::2]).sum(dim=1) - torch.tensor([pair.score for pair in decompositions])

    names = [*HEADS, *FEED_FORWARDS]
    prediction = np.array([[predicted(pair, name) for pair in decompositions] for name in names])
    effect = torch.stack([actual(name) for name in names]).numpy()
    groups = {
        "all heads": slice(0, 72),
        "heads of layers 0-1": slice(0, 24),
        "heads of layers 4-5": slice(48, 72),
        "feed-forwards": slice(72, 78),
    }
    found = {group: correlation(prediction[rows], effect[rows]) for group, rows in groups.items()}
    print(how, {group: round(value, 3) for group, value in found.items()})
    assert found["heads of layers 4-5"] > 0.9
    assert found["all heads"] > 0.75
    assert found["heads of layers 0-1"] < 0.5  # what they write is read by others: no direct path tells their effect


def test_the_table_names_the_largest(encoder):
    result = decompose_pair(encoder, FIRST, SECOND)
    title, first, *_ = result.table(rows=3).splitlines()
    place = int(result.by_component.abs().argmax())
    row, column = divmod(place, 106)
    assert title == f"cosine {result.score:.6f}, sum {result.score:.6f}"
    assert first.split() == [
        f"{result.by_component.max():+.4f}",
        result.components[row],
        "x",
        result.components[column],
    ]
    assert len(result.table(rows=3).splitlines()) == 4


def test_what_can_not_be_decomposed(encoder):
    with pytest.raises(ValueError, match="metric must be cosine or dot, got 'manhattan'"):
        decompose_pair(encoder, FIRST, SECOND, "manhattan")
    with pytest.raises(ValueError, match="more than the limit of 128"):
        decompose(encoder, "word " * 200)
