"""What `capture` returns is what the reference implementation computes at each point, and what `encode` returns."""

import copy
import types

import pytest
import torch
import transformers

import minilm
from minilm.internals import Activations, UnknownPointError, capture, points_of
from minilm.internals.observed import ObservedBackend, observe
from minilm.internals.points import PATTERN
from minilm.kernels.backend import BackendWarning
from minilm.parity import OPERATIONS, check_parity

LONGEST = "one " * 126  # 128 tokens
ODD = ["", "A man is eating food.", LONGEST, "a", "A man is eating food.", "He isn't, though: nobody ate; ever.", "\n"]
LIMIT = 5e-6
LETTERS = {"C": 384, "F": 1536, "H": 12, "D": 32}

# Where the reference has each tensor: a module, and whether it is what goes in or what comes out.
EMBEDDINGS = {
    "embeddings.word": ("embeddings.word_embeddings", "out"),
    "embeddings.position": ("embeddings.position_embeddings", "out"),
    "embeddings.token_type": ("embeddings.token_type_embeddings", "out"),
    "embeddings": ("embeddings", "out"),
}
LAYER = {
    "attention.query": ("attention.self.query", "out"),
    "attention.key": ("attention.self.key", "out"),
    "attention.value": ("attention.self.value", "out"),
    "attention.head_outputs": ("attention.output.dense", "in"),
    "attention.output": ("attention.output.dense", "out"),
    "attention_residual": ("attention.output.LayerNorm", "in"),
    "attention_norm": ("attention.output.LayerNorm", "out"),
    "feed_forward.pre_activation": ("intermediate.dense", "out"),
    "feed_forward.activation": ("intermediate", "out"),
    "feed_forward.output": ("output.dense", "out"),
    "feed_forward_residual": ("output.LayerNorm", "in"),
    "output": ("output.LayerNorm", "out"),
}
PLACES = EMBEDDINGS | {
    f"layers.{k}.{point}": (f"encoder.layer.{k}.{module}", side)
    for k in range(6)
    for point, (module, side) in LAYER.items()
}


@pytest.fixture(scope="module")
def bert(weights_folder):
    """The reference, with attention written out, which alone shows its probabilities."""
    return transformers.BertModel.from_pretrained(weights_folder, attn_implementation="eager").eval()


def reference(bert, encoder, text):
    """Every point of one text, alone, in the reference; scores and what comes of the tokens by their definitions."""
    found, hooks = {}, []
    for point, (name, side) in PLACES.items():
        module = bert.get_submodule(name)

        def keep(_, inputs, output, point=point, side=side):
            found[point] = (inputs[0] if side == "in" else output)[0]

        hooks.append(module.register_forward_hook(keep))
    try:
        ids = torch.tensor([encoder.tokenizer(text).ids])
        with torch.inference_mode():
            outputs = bert(ids, output_attentions=True, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    for k in range(6):
        name = f"layers.{k}.attention"
        for which in ("query", "key", "value", "head_outputs"):
            found[f"{name}.{which}"] = found[f"{name}.{which}"].unflatten(1, (12, 32))
        found[f"{name}.scores"] = torch.einsum("qhd,khd->hqk", found[f"{name}.query"], found[f"{name}.key"]) / 32**0.5
        found[f"{name}.pattern"] = outputs.attentions[k][0]  # of the reference itself
        assert (outputs.hidden_states[k + 1][0] == found[f"layers.{k}.output"]).all()
    found["pooled"] = outputs.last_hidden_state[0].mean(dim=0)
    found["embedding"] = found["pooled"] / found["pooled"].norm()
    return found


@pytest.fixture(scope="module")
def truth(bert, encoder):
    return [reference(bert, encoder, text) for text in ODD]


@pytest.fixture(scope="module")
def exact(bert, canonical_folder):
    """Every point in float64: ours, and the reference's."""
    encoder = minilm.load(canonical_folder, device="cpu", dtype="float64")
    bert = copy.deepcopy(bert).double()
    return [(capture(encoder, text), reference(bert, encoder, text)) for text in ODD]


def relative(actual, expected):
    """The largest difference, in units of each token's largest entry (which reaches 10) or of 1, whichever is more."""
    return ((actual - expected).abs() / expected.abs().amax(dim=-1, keepdim=True).clamp(min=1)).max().item()


@pytest.mark.parametrize("point", points_of(minilm.MiniLMConfig()))
def test_every_point_is_transformers_in_float64(exact, point):
    """So what it is called is what it is; each text alone in both."""
    for captured, expected in exact:
        actual = captured[point][0]
        assert actual.shape == expected[point].shape
        assert (actual - expected[point]).abs().max() <= 1e-10


def test_hidden_states_and_attentions_are_the_references(encoder, truth):
    """In float32: what `output_hidden_states` and `output_attentions` give, each text alone.

    Hidden states in units of each token's largest entry, which reaches 10, as in tests/test_parity.py: the reference
    itself, with attention written out or by `sdpa`, differs from itself by more than 5e-6 where a text is long.
    """
    states = ["embeddings", *(f"layers.{k}.output" for k in range(6))]
    patterns = [f"layers.{k}.attention.pattern" for k in range(6)]
    for text, expected in zip(ODD, truth, strict=True):
        captured = capture(encoder, text, states + patterns)
        hidden = max(relative(captured[name][0], expected[name]) for name in states)
        attention = max(float((captured[name][0] - expected[name]).abs().max()) for name in patterns)
        vector = float((captured.embeddings[0] - expected["embedding"]).abs().max())
        print(f"{len(text)} characters: hidden states {hidden:.1e}, attentions {attention:.1e}, vector {vector:.1e}")
        assert max(hidden, attention) <= LIMIT
        assert vector <= 1e-6


def test_together_as_alone(encoder, truth):
    """One call for all: order, duplicates and lengths. Batches differ in their last bits, so twice the limit."""
    captured = capture(encoder, ODD)
    assert list(captured.activations) == list(points_of(encoder.config))
    for name, activations in captured.activations.items():
        assert len(activations) == len(ODD)
        for actual, expected in zip(activations, truth, strict=True):
            assert relative(actual, expected[name]) <= 2 * LIMIT, name


def test_shapes_are_as_the_points_say(encoder):
    captured = capture(encoder, ODD)
    lengths = [len(encoder.tokenizer(text)) for text in ODD]
    assert lengths[0] == 2  # [CLS] [SEP]
    assert lengths[2] == 128
    for name, activations in captured.activations.items():
        for value, length in zip(activations, lengths, strict=True):
            sizes = {**LETTERS, "L": length}
            assert list(value.shape) == [sizes[letter] for letter in activations.point.shape.split()], name


def test_embeddings_are_what_encode_returns(encoder):
    captured = capture(encoder, ODD, [])
    assert list(captured.activations) == ["embedding"]
    assert captured.texts == ODD
    assert captured.embeddings.shape == (7, 384)
    assert abs(captured.embeddings.numpy() - encoder.encode(ODD)).max() < 1e-6


@pytest.mark.parametrize("pooling", ["cls", "max", "avg_top2", "avg_first_last"])
def test_with_every_pooling(canonical_folder, pooling):
    encoder = minilm.load(canonical_folder, device="cpu", pooling=pooling, normalize=False)
    captured = capture(encoder, ODD, "pooled")
    expected = torch.from_numpy(encoder.encode(ODD))
    assert relative(captured["pooled"].packed, expected) < 1e-6
    assert (captured["pooled"].packed == captured.embeddings).all()


def test_tokens(encoder):
    captured = capture(encoder, ["Unbelievably good.", ""], "embeddings")
    assert captured.tokens == [
        ["[CLS]", "un", "##bel", "##ie", "##va", "##bly", "good", ".", "[SEP]"],
        ["[CLS]", "[SEP]"],
    ]


def test_many_texts_stay_in_their_order(encoder, own_sentences):
    """More than fit a batch."""
    texts = [LONGEST, *own_sentences[:70]]
    captured = capture(encoder, texts, ["embeddings.word", "layers.0.attention.pattern"])
    for index in (0, 1, 31, 32, 33, 63, 64, 70):
        ids = torch.tensor(encoder.tokenizer(texts[index]).ids)
        assert (captured["embeddings.word"][index] == encoder.model.embeddings.word.weight[ids]).all()
        pattern = capture(encoder, texts[index], "layers.0.attention.pattern")["layers.0.attention.pattern"][0]
        assert (captured["layers.0.attention.pattern"][index] - pattern).abs().max() < 1e-6


# Views.


def test_packed(encoder):
    captured = capture(encoder, ODD, ["layers.1.output", "layers.1.attention.query", "layers.1.attention.pattern"])
    assert captured["layers.1.output"].packed.shape == (sum(map(len, captured.tokens)), 384)
    assert captured["layers.1.attention.query"].packed.shape == (sum(map(len, captured.tokens)), 12, 32)
    assert (captured["layers.1.output"].packed[2:10] == captured["layers.1.output"][1][:8]).all()
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.pattern has a row and a column for each token"):
        _ = captured["layers.1.attention.pattern"].packed


def test_padded(encoder):
    captured = capture(encoder, ["", "A man."], ["layers.1.output", "layers.1.attention.pattern"])
    padded = captured["layers.1.output"].padded(fill=-7.0)
    assert padded.shape == (2, 5, 384)
    assert (padded[0, :2] == captured["layers.1.output"][0]).all()
    assert (padded[0, 2:] == -7).all()
    assert (padded[1] == captured["layers.1.output"][1]).all()
    pattern = captured["layers.1.attention.pattern"].padded()
    assert pattern.shape == (2, 12, 5, 5)
    assert pattern[0].sum() == pytest.approx(24, abs=1e-4)
    assert (pattern[0, :, 2:] == 0).all()
    assert (pattern[0, :, :, 2:] == 0).all()
    assert (captured.activations["embedding"].padded() == captured.embeddings).all()


def test_by_a_name_of_transformer_lens(encoder):
    captured = capture(encoder, "A man.", "blocks.2.hook_resid_pre")
    assert captured["blocks.2.hook_resid_pre"] is captured["layers.1.output"]
    assert isinstance(captured["layers.1.output"], Activations)
    assert repr(captured["layers.1.output"]) == "Activations(layers.1.output [L C] of 1 texts)"


def test_what_was_not_captured(encoder):
    captured = capture(encoder, "A man.", "pooled")
    with pytest.raises(
        UnknownPointError, match=r"layers\.1\.output is not among the points captured: pooled, embedding"
    ):
        captured["layers.1.output"]


# Bad input.


def test_bad_input(encoder):
    before = encoder.model.backend
    with pytest.raises(ValueError, match=r"text 1 has 130 tokens, more than the limit of 128"):
        capture(encoder, ["short", "one " * 128])
    with pytest.raises(ValueError, match="at least one text, got none"):
        capture(encoder, [])
    with pytest.raises(TypeError, match="text 1 to be a string"):
        capture(encoder, ["short", None])
    with pytest.raises(UnknownPointError, match=r"did you mean pooled"):
        capture(encoder, "short", "poled")
    assert encoder.model.backend is before


def test_a_text_too_long_can_be_cut(encoder):
    captured = capture(encoder, "one " * 200, "embeddings", on_truncate="ignore")
    assert captured["embeddings"][0].shape == (128, 384)
    assert captured.tokens[0][-1] == "[SEP]"
    assert abs(captured.embeddings[0].numpy() - encoder.encode("one " * 200, on_truncate="ignore")).max() < 1e-6


# Gradients.


def test_a_graph_only_if_asked_for(encoder):
    assert not capture(encoder, "A man.").embeddings.requires_grad
    captured = capture(encoder, ["A man.", "A dog is here."], "layers.3.attention.pattern", gradients=True)
    assert all(value.requires_grad for value in captured["layers.3.attention.pattern"])
    weight = encoder.model.layers[0].feed_forward.output.bias
    (actual,) = torch.autograd.grad(captured.embeddings[0] @ captured.embeddings[1], weight)
    batch = [minilm.PackedBatch.from_sequences([encoder.tokenizer(text).ids]) for text in captured.texts]
    with encoder.model.use_backend("torch"):
        first, second = (encoder.model(each).last_hidden_state.mean(dim=0) for each in batch)
    (expected,) = torch.autograd.grad(torch.cosine_similarity(first, second, dim=0), weight)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradients_with_respect_to_what_was_captured(encoder):
    captured = capture(encoder, "A man.", "layers.3.output", gradients=True)
    (gradient,) = torch.autograd.grad(captured.embeddings.sum(), captured["layers.3.output"][0])
    assert gradient.abs().max() > 0


# The backend.


class Unobserved(ObservedBackend):
    """It without a model whose layers it could name: anybody's layers will do."""

    def __init__(self, config):
        super().__init__(minilm.MiniLM(config, "torch"), {})
        self._names = type("AnyLayer", (), {"__getitem__": lambda *_: "layers.0"})()
        self._now = types.SimpleNamespace(batch=None)


def test_parity(encoder):
    """Each operation, its gradients, and whole vectors, against float64 and plain torch."""
    texts = [text for text in ODD if text != LONGEST]
    rows = check_parity(encoder, Unobserved, texts, dtypes=[torch.float32], quick=True)
    assert {row.operation for row in rows} >= {*OPERATIONS, "encoder, gradients", "vectors"}
    assert [row for row in rows if not row.ok] == []


def test_a_model_that_nobody_observes_has_nothing_in_its_way(own_encoder):
    """So hooks that are not there cost nothing: the very same object computes."""
    backend, choice = own_encoder.model.backend, own_encoder.model.backend_choices
    with observe(own_encoder, {}) as observed:
        assert own_encoder.model.backend is observed
    capture(own_encoder, "A man.")
    assert own_encoder.model.backend is backend
    assert own_encoder.model.backend_choices == choice
    assert not isinstance(backend, ObservedBackend)


@pytest.mark.parametrize("choice", ["packed", "int8"])
def test_a_backend_that_was_chosen_hands_over_visibly(own_encoder, choice):
    with own_encoder.model.use_backend(choice) as chosen:
        with pytest.warns(BackendWarning, match=rf"the {choice} backend has no points to look at; plain torch"):
            captured = capture(own_encoder, "A man.")
        assert own_encoder.model.backend is chosen
    assert (captured.embeddings == capture(own_encoder, "A man.").embeddings).all()  # and auto, which was not chosen


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_what_is_plain_or_left_open_needs_no_warning(own_encoder, choice):
    with own_encoder.model.use_backend(choice):
        capture(own_encoder, "A man.")


def test_visitors_are_told_where_they_are(encoder):
    sites = []
    with observe(encoder, {"layers.0.attention.scores": [lambda value, site: sites.append((value.shape, site))]}):
        encoder.encode(["one two", "three", "four five"])
    shapes = [(list(shape), list(site.texts)) for shape, site in sites]
    batch = sites[0][1].batch
    assert sorted(shapes) == [([1, 12, 3, 3], [2]), ([2, 12, 4, 4], [0, 1])]
    assert batch.lengths == (4, 4, 3)  # encode puts the longest first
    assert all(site.point.rows == PATTERN for _, site in sites)


def test_a_visitor_must_keep_the_shape(own_encoder):
    with (
        observe(own_encoder, {"pooled": [lambda value, _: value[:, :7]]}),
        pytest.raises(ValueError, match=r"takes the place of pooled must have its shape \[1, 384\], got \[1, 7\]"),
    ):
        own_encoder.encode("A man.")
