"""The embedding lens against the model's own vectors and hidden states, and against scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from minilm import load
from minilm.evaluate.sts_data import read_tsv
from minilm.internals import ablate, capture, geometry
from minilm.internals.lens import layer_cka, layer_embeddings, layer_geometry, layer_similarities, layer_sts
from minilm.internals.points import UnknownPointError

LAYERS = ["embeddings", *(f"layers.{layer}.output" for layer in range(6))]


def test_layers_are_the_hidden_states_pooled(encoder, texts):
    captured = capture(encoder, texts, LAYERS)
    embeddings = layer_embeddings(encoder, texts)
    assert list(embeddings.pooled) == LAYERS
    for point in LAYERS:
        expected = torch.stack([rows.mean(dim=0) for rows in captured[point]])
        torch.testing.assert_close(embeddings[point], expected, rtol=0, atol=1e-5)


def test_the_last_layer_is_what_encode_returns(encoder, texts):
    last = torch.nn.functional.normalize(layer_embeddings(encoder, texts)["layers.5.output"])
    torch.testing.assert_close(last, torch.from_numpy(encoder.encode(texts)), rtol=0, atol=1e-6)


def test_points_of_other_shapes(encoder, texts):
    found = layer_embeddings(
        encoder, texts[:3], ["layers.2.attention.head_outputs", "embedding", "blocks.1.mlp.hook_post"]
    )
    widths = {point: vectors.shape[1] for point, vectors in found.pooled.items()}
    assert widths == {
        "layers.1.feed_forward.activation": 1536,
        "layers.2.attention.head_outputs": 384,
        "embedding": 384,
    }
    heads = capture(encoder, texts[:3], "layers.2.attention.head_outputs")["layers.2.attention.head_outputs"]
    expected = torch.stack([rows.mean(dim=0).flatten() for rows in heads])
    torch.testing.assert_close(found["layers.2.attention.head_outputs"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["embedding"], encoder.encode(texts[:3]), atol=1e-6)


@pytest.mark.parametrize(("pooling", "reduce"), [("cls", lambda x: x[0]), ("avg_first_last", lambda x: x.mean(0))])
def test_pooling_is_the_model_s(canonical_folder, texts, pooling, reduce):
    other = load(canonical_folder, device="cpu", pooling=pooling)
    hidden = capture(other, texts[:4], "layers.3.output")["layers.3.output"]
    expected = torch.stack([reduce(rows) for rows in hidden])
    found = layer_embeddings(other, texts[:4], "layers.3.output")["layers.3.output"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_equal_texts_are_one_row(encoder):
    embeddings = layer_embeddings(encoder, ["a dog", "a cat", "a dog"], "embedding")
    assert embeddings["embedding"].shape == (2, 384)
    cat, dog = encoder.encode(["a cat", "a dog"])
    assert embeddings.cosines(["a dog", "a cat"], ["a dog", "a dog"])["embedding"] == pytest.approx([1, cat @ dog])


def test_similarity_by_layer(encoder):
    a, b = "A man is eating.", "Someone eats."
    figures = layer_similarities(encoder, a, b)
    assert figures.figure("cosine")[-1] == pytest.approx(0.7830, abs=1e-4)
    assert list(figures.values) == LAYERS
    with ablate(encoder, "layers.5.output"):
        assert layer_similarities(encoder, a, b)["layers.5.output"]["cosine"] == 0
    assert "layers.5.output  0.7830" in figures.table()


@pytest.fixture(scope="module")
def sts(tmp_path_factory, sts_folder):
    """The first 150 pairs of STS-B's test set, as a folder."""
    lines = (sts_folder / "stsb" / "test.tsv").read_text(encoding="utf-8").splitlines()[:150]
    folder = tmp_path_factory.mktemp("sts")
    (folder / "stsb").mkdir()
    (folder / "stsb" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_sts_by_layer(encoder, sts):
    figures = layer_sts(encoder, sts, points=["layers.2.output", "layers.5.output"])
    pairs = read_tsv(sts / "stsb" / "test.tsv")
    for point in ("layers.2.output", "layers.5.output"):
        hidden = capture(encoder, [*pairs.first, *pairs.second], point)[point]
        pooled = torch.nn.functional.normalize(torch.stack([rows.mean(dim=0) for rows in hidden]).double())
        cosines = (pooled[:150] * pooled[150:]).sum(dim=1).numpy().round(7)
        expected = 100 * spearmanr(cosines, pairs.scores).statistic
        assert figures[point]["stsb"] == pytest.approx(expected, abs=0.02)  # rounding of float32 may swap ranks
        assert figures[point]["average"] == figures[point]["stsb"]


def test_geometry_by_layer(encoder, own_sentences):
    pairs = [("A dog runs.", "A dog is running."), ("Rain fell.", "It rained.")]
    figures = layer_geometry(encoder, own_sentences, pairs, ["layers.0.output", "layers.5.output"])
    vectors = layer_embeddings(encoder, own_sentences)["layers.5.output"]
    last = figures["layers.5.output"]
    assert last["effective rank"] == pytest.approx(geometry.effective_rank(vectors.double() - vectors.double().mean(0)))
    unit = encoder.encode(own_sentences)
    assert last["mean cosine"] == pytest.approx(geometry.mean_cosine(unit), abs=1e-6)
    assert last["uniformity"] == pytest.approx(geometry.uniformity(unit), abs=1e-6)
    assert last["partition isotropy"] == pytest.approx(geometry.partition_isotropy(unit), abs=1e-5)
    a, b = encoder.encode([pair[0] for pair in pairs]), encoder.encode([pair[1] for pair in pairs])
    assert last["alignment"] == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), abs=1e-6)
    assert last["mean cosine"] < figures["layers.0.output"]["mean cosine"]  # the last layer is the isotropic one
    assert "alignment" not in layer_geometry(encoder, own_sentences[:9], points="embedding")["embedding"]


def test_cka_of_layers_and_models(encoder, canonical_folder, own_sentences):
    texts = own_sentences[:40]
    alignment = layer_cka(encoder, texts, debiased=True)
    assert alignment.rows == alignment.columns == tuple(LAYERS)
    np.testing.assert_allclose(alignment.values.diagonal(), 1, atol=1e-9)
    np.testing.assert_allclose(alignment.values, alignment.values.T, atol=1e-12)
    pooled = layer_embeddings(encoder, texts)
    expected = geometry.cka(pooled["embeddings"], pooled["layers.2.output"], debiased=True)
    assert alignment.values[0, 3] == pytest.approx(expected)
    other = load(canonical_folder, device="cpu", pooling="cls")
    between = layer_cka(encoder, texts, other, "layers.5.output", kernel="rbf")
    theirs = layer_embeddings(other, texts)["layers.5.output"]
    assert between.values.item() == pytest.approx(geometry.cka(pooled["layers.5.output"], theirs, "rbf"))
    assert between.values.item() < 0.99
    assert "layers.5.output" in between.table()


def test_bad_input(encoder):
    with pytest.raises(UnknownPointError, match=r"layers.3.output"):
        layer_embeddings(encoder, "a", "layers.3.outputs")
    with pytest.raises(ValueError, match="as wide as the text is long"):
        layer_embeddings(encoder, "a", "layers.3.attention.pattern")
    with pytest.raises(ValueError, match="at least one text"):
        layer_embeddings(encoder, [])
    with pytest.raises(ValueError, match="text 1 has 1002 tokens"):
        layer_embeddings(encoder, ["a", "dog " * 1000])
