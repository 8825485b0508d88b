import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from minilm.batch import PackedBatch
from minilm.internals import ablate, capture
from minilm.internals import line as line_module
from minilm.internals.attribution import attribute_similarity, attribute_text, integrated_jacobian
from minilm.internals.line import ConvergenceWarning, nodes
from minilm.kernels.torch_backend import TorchBackend

FIRST, SECOND = "A man is eating bread.", "Someone has food."


def reference_vector(encoder, text, word="[PAD]"):
    """The reference's embedding by the public way: a text of nothing but this word."""
    return encoder.encode(" ".join([word] * (encoder.token_counts([text])[0] - 2)))


@pytest.mark.parametrize(
    ("point", "limit"),
    [("embeddings", 1e-4), ("layers.1.output", 1e-5), ("layers.3.output", 1e-6), ("layers.4.output", 1e-6)],
)
def test_a_pair_sums_to_the_four_scores(encoder, point, limit):
    result = attribute_similarity(encoder, FIRST, SECOND, point)
    a, b = encoder.encode([FIRST, SECOND]).astype(np.float64)
    r, s = (reference_vector(encoder, text).astype(np.float64) for text in (FIRST, SECOND))
    expected = a @ b - r @ b - a @ s + r @ s
    print(f"{point}: residual {result.residual:.1e}, steps {result.first.steps} and {result.second.steps}")
    assert result.by_token.shape == (8, 6)
    assert float(result.by_token.sum()) == pytest.approx(expected, abs=limit)
    assert result.attributable == pytest.approx(expected, abs=1e-6)
    assert abs(result.residual) <= limit
    assert result.score == pytest.approx(a @ b, abs=1e-6)
    assert result.reference_scores == pytest.approx((r @ b, a @ s, r @ s), abs=1e-6)
    for matrix in (result.with_references, result.score_by_token):
        assert float(matrix.sum()) == pytest.approx(a @ b, abs=limit)


def test_a_matches_the_whole_jacobian(own_encoder):
    """J averaged over the line, formed entry by entry, in float64; nodes on the whole line rather than its halves."""
    encoder = own_encoder.to("cpu", "float64")
    depth, backend = 5, TorchBackend(encoder.config)
    places, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))

    def moves(text):
        ids = encoder.tokenizer(text).ids
        reference = [ids[0], *[0] * (len(ids) - 2), ids[-1]]
        batch = PackedBatch.from_sequences([ids])

        def states(tokens):
            states = PackedBatch.from_sequences([tokens])
            return encoder.model(states, hidden_states=True).hidden_states[depth].detach()

        def embedding(x):
            for layer in encoder.model.layers[depth:]:
                x = layer(x, batch, backend)
            return backend.pool([x], batch, "mean", 0, True)[0]

        end, start = states(ids), states(reference)
        jacobian = sum(
            weight / 2 * torch.autograd.functional.jacobian(embedding, start + t * (end - start), vectorize=True)
            for t, weight in zip((places + 1) / 2, weights, strict=True)
        )  # [C, L, C]
        return torch.einsum("dlc,lc->ld", jacobian, end - start)

    with encoder.model.use_backend(backend):
        expected = moves("Dogs bark.") @ moves("No.").T
    result = attribute_similarity(encoder, "Dogs bark.", "No.", "layers.4.output", tolerance=1e-9)
    assert result.by_token == pytest.approx(expected, abs=1e-8)
    assert abs(result.residual) < 1e-8


def test_the_other_way_round_is_the_transpose(encoder):
    one = attribute_similarity(encoder, FIRST, SECOND, "layers.4.output")
    other = attribute_similarity(encoder, SECOND, FIRST, "layers.4.output")
    assert other.by_token == pytest.approx(one.by_token.T, abs=1e-12)


@pytest.mark.parametrize(
    ("pooling", "metric", "normalize"),
    [
        ("cls", "dot", False),
        ("mean_sqrt_len", "cosine", False),
        ("avg_top2", "dot", True),
        ("avg_first_last", "cosine", False),
        ("avg_first_last", "dot", False),
    ],
)
def test_every_smooth_pooling_is_complete(own_encoder, pooling, metric, normalize):
    own_encoder.encoding = replace(own_encoder.encoding, pooling=pooling, normalize=normalize)
    result = attribute_similarity(own_encoder, FIRST, SECOND, "layers.3.output", metric=metric)
    a, b = own_encoder.encode([FIRST, SECOND]).astype(np.float64)
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    assert result.score == pytest.approx(a @ b / (scale if metric == "cosine" else 1), rel=1e-5)
    assert abs(result.residual) <= (1e-5 * scale if metric == "dot" else 1e-5)
    expected = reference_vector(own_encoder, FIRST)
    reference = result.first.reference / result.first.reference.norm()
    assert reference == pytest.approx(torch.from_numpy(expected / np.linalg.norm(expected)).double(), abs=1e-6)


def test_references(encoder):
    masked = attribute_similarity(encoder, FIRST, SECOND, "layers.4.output", reference="[MASK]")
    assert masked.first.reference_tokens == ["[CLS]", *["[MASK]"] * 6, "[SEP]"]
    vector = torch.from_numpy(reference_vector(encoder, FIRST, "[MASK]"))
    assert masked.first.reference == pytest.approx(vector.double(), abs=1e-6)
    other = "A cat is eating fish."
    changed = integrated_jacobian(encoder, FIRST, "layers.4.output", reference=other)
    assert changed.reference == pytest.approx(torch.from_numpy(encoder.encode(other)).double(), abs=1e-6)
    unmoved = integrated_jacobian(encoder, FIRST, "embeddings", reference="A cat is eating fish.", steps=2)
    same = torch.tensor([mine == theirs for mine, theirs in zip(unmoved.tokens, unmoved.reference_tokens, strict=True)])
    assert same.tolist() == [True, True, False, True, True, False, True, True]
    assert not unmoved.contributions[same].any()  # a token that does not differ moves nothing
    assert unmoved.contributions[~same].norm(dim=1).min() > 0.1


def test_patches_in_force_are_seen(encoder):
    with ablate(encoder, "layers.5.attention.head_outputs"):
        result = attribute_similarity(encoder, FIRST, SECOND, "layers.4.output")
        a, b = capture(encoder, [FIRST, SECOND], "embedding").embeddings
    assert result.score == pytest.approx(float(a @ b), abs=1e-6)
    assert abs(result.residual) <= 1e-6
    assert abs(result.score - attribute_similarity(encoder, FIRST, SECOND, "layers.5.output").score) > 0.01


def test_portions_make_no_difference(encoder, monkeypatch):
    whole = integrated_jacobian(encoder, FIRST, "layers.3.output", steps=8)
    monkeypatch.setattr(line_module, "ROWS", 17)  # one node, two directions at a time
    parts = integrated_jacobian(encoder, FIRST, "layers.3.output", steps=8)
    assert parts.contributions == pytest.approx(whole.contributions, abs=1e-6)


def test_too_few_nodes_are_reported(encoder, monkeypatch):
    monkeypatch.setattr(line_module, "STEPS", (2, 4))
    with pytest.warns(ConvergenceWarning, match="4 nodes"):
        result = integrated_jacobian(encoder, FIRST, "layers.3.output")
    assert result.residual > 1e-3
    monkeypatch.setattr(line_module, "STEPS", (2, 4, 8, 16))
    assert integrated_jacobian(encoder, FIRST, "layers.3.output", tolerance=0.05).steps == 8


@pytest.mark.parametrize("point", ["embeddings", "layers.2.output"])
def test_text_attribution_agrees_with_captum(encoder, point):
    attr = pytest.importorskip("captum.attr", reason="captum is not installed (extra: test)")
    ids = encoder.tokenizer(FIRST).ids
    states = capture(encoder, [FIRST, " ".join(["[PAD]"] * (len(ids) - 2))], point)[point]
    depth = 0 if point == "embeddings" else 3
    target = torch.from_numpy(encoder.encode(SECOND))
    backend = TorchBackend(encoder.config)

    def score(x):  # [n, L, C] -> [n]
        batch = PackedBatch.from_sequences([ids] * len(x))
        x = x.flatten(0, 1)
        for layer in encoder.model.layers[depth:]:
            x = layer(x, batch, backend)
        return backend.pool([x], batch, "mean", 0, True) @ target

    x, r = (state.unsqueeze(0).detach() for state in states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's own
        expected = {
            "gradient": attr.Saliency(score).attribute(x.requires_grad_(), abs=False),
            "gradient_x_input": attr.InputXGradient(score).attribute(x),
            "integrated_gradients": attr.IntegratedGradients(score).attribute(x, r, n_steps=96, internal_batch_size=16),
        }
    for method, values in expected.items():
        result = attribute_text(encoder, FIRST, SECOND, method, point)
        assert result.values == pytest.approx(values[0].detach().double(), abs=1e-6 * max(1, values.abs().max()) * 5)
        assert result.score == pytest.approx(score(x).item(), abs=1e-6)
        assert result.by_token.shape == (8,)
    assert abs(result.residual) <= 1e-5
    assert result.reference_score == pytest.approx(score(r).item(), abs=1e-6)


def test_integrated_gradients_are_the_integrated_jacobian_seen_from_the_target(encoder):
    text = attribute_text(encoder, FIRST, SECOND, point="layers.3.output")
    vector = torch.from_numpy(encoder.encode(SECOND)).double()
    jacobian = integrated_jacobian(encoder, FIRST, "layers.3.output")
    assert text.by_token == pytest.approx(jacobian.contributions @ vector, abs=1e-6)
    assert attribute_text(encoder, FIRST, 3 * vector, point="layers.3.output").values == pytest.approx(
        text.values, abs=1e-6
    )
    pooled = attribute_text(encoder, FIRST, 3 * vector, point="layers.3.output", metric="dot")
    assert pooled.score == pytest.approx(3 * text.score, abs=1e-6)


def test_nodes_integrate_polynomials():
    places, weights = nodes(8)
    for power in range(8):  # four nodes a half are exact to degree 7
        assert float(weights @ places**power) == pytest.approx(1 / (power + 1), abs=1e-14)


def test_what_can_not_be_attributed(encoder, own_encoder):
    pair = (encoder, FIRST, SECOND)
    with pytest.raises(ValueError, match="metric must be cosine or dot, got 'euclidean'"):
        attribute_similarity(*pair, metric="euclidean")
    with pytest.raises(ValueError, match=r"one of embeddings, layers\.0\.output"):
        attribute_similarity(*pair, "layers.3.attention.output")
    with pytest.raises(ValueError, match=r"did you mean layers\.3\.output"):
        attribute_similarity(*pair, "layers.3.outptu")
    with pytest.raises(ValueError, match=r"has 4 tokens with .* the text 8"):
        attribute_similarity(*pair, reference="two words")
    with pytest.raises(ValueError, match="more than the limit of 128"):
        attribute_similarity(encoder, "word " * 200, SECOND)
    with pytest.raises(ValueError, match=r"even number.*got 7"):
        attribute_similarity(*pair, steps=7)
    with pytest.raises(ValueError, match="method must be one of gradient"):
        attribute_text(*pair, "saliency")
    with pytest.raises(ValueError, match=r"vector \[384\], got \[3\]"):
        attribute_text(encoder, FIRST, torch.ones(3))
    with pytest.raises(ValueError, match="only integrated gradients sum"):
        _ = attribute_text(*pair, "gradient").residual
    with pytest.raises(ValueError, match=r"got torch\.bfloat16; use encoder\.to"):
        attribute_similarity(own_encoder.to("cpu", "bfloat16"), FIRST, SECOND)
