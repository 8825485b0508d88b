"""A patched model is what the reference computes with the same change, and afterwards it is as it was."""

import threading

import pytest
import torch
import transformers

import minilm
from minilm.internals import UnknownPointError, ablate, capture, patch

FIRST, SECOND = "The old man sleeps in the garden.", "A dog runs over the green field, barking."
LIMIT = 2e-6


@pytest.fixture(scope="module")
def reference(weights_folder, encoder):
    """Vectors of the reference, with what comes out of (or, `inputs`, goes into) one of its modules changed."""
    bert = transformers.BertModel.from_pretrained(weights_folder, attn_implementation="eager").eval()

    def vector(text, module, change, inputs=False):
        def replace(_, args, output=None):
            return (change(args[0]), *args[1:]) if inputs else change(output)

        target = bert.get_submodule(module)
        hook = target.register_forward_pre_hook(replace) if inputs else target.register_forward_hook(replace)
        try:
            with torch.inference_mode():
                hidden = bert(torch.tensor([encoder.tokenizer(text).ids])).last_hidden_state[0]
        finally:
            hook.remove()
        return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)

    return vector


def vectors(encoder, *texts):
    return torch.from_numpy(encoder.encode(list(texts)))


def at(index, value):
    """A function that puts a value at an index of the reference's tensor `[1, L, ...]`."""

    def change(x):
        x = x.clone()
        x[index] = value
        return x

    return change


HEAD_5 = slice(5 * 32, 6 * 32)


def twice_head_5(x):
    return torch.cat([x[..., :160], 2 * x[..., HEAD_5], x[..., 192:]], dim=-1)


CHANGES = {  # what is patched here, and how the reference has the same done to it
    "a feed-forward": (
        ("layers.2.feed_forward.output", 0.0, {}),
        ("encoder.layer.2.output.dense", torch.zeros_like, {}),
    ),
    "a head": (
        ("layers.3.attention.head_outputs", 0.0, {"head": 5}),
        ("encoder.layer.3.attention.output.dense", at((..., HEAD_5), 0), {"inputs": True}),
    ),
    "the head from the end": (
        ("layers.3.attention.head_outputs", 0.0, {"head": -7}),
        ("encoder.layer.3.attention.output.dense", at((..., HEAD_5), 0), {"inputs": True}),
    ),
    "a position": (
        ("layers.1.output", 0.25, {"position": 2}),
        ("encoder.layer.1.output.LayerNorm", at((0, 2), 0.25), {}),
    ),
    "the last position": (
        ("embeddings", torch.arange(384) / 100, {"position": -1}),
        ("embeddings", at((0, -1), torch.arange(384) / 100), {}),
    ),
    "a head's value at a position": (
        ("blocks.0.attn.hook_v", torch.arange(32) / 10, {"head": 5, "position": 1}),
        ("encoder.layer.0.attention.self.value", at((0, 1, HEAD_5), torch.arange(32) / 10), {}),
    ),
    "a function": (
        ("layers.4.feed_forward.activation", torch.Tensor.abs, {}),
        ("encoder.layer.4.intermediate", torch.Tensor.abs, {}),
    ),
    "a function of a head": (
        ("layers.4.attention.key", lambda x: 2 * x, {"head": 5}),
        ("encoder.layer.4.attention.self.key", twice_head_5, {}),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), CHANGES.values(), ids=CHANGES.keys())
def test_a_patch_does_what_the_same_change_does_in_transformers(encoder, reference, ours, theirs):
    point, value, place = ours
    module, change, how = theirs
    plain = vectors(encoder, FIRST, SECOND)
    with patch(encoder, point, value, **place):
        patched = vectors(encoder, FIRST, SECOND)
    expected = torch.stack([reference(text, module, change, **how) for text in (FIRST, SECOND)])
    assert (patched - expected).abs().max() <= LIMIT
    assert (patched - plain).abs().max() > 1e-3


def test_what_is_there_already_changes_nothing(encoder):
    """Every point's own value in its place."""
    captured = capture(encoder, FIRST)
    for name, activations in captured.activations.items():
        with patch(encoder, name, activations[0]):
            assert (capture(encoder, FIRST, []).embeddings == captured.embeddings).all(), name


def test_attention_patterns(encoder):
    """A token that looks at itself alone gets its own value; one row, and one head, at a time."""
    name = "layers.2.attention"
    points = [f"{name}.value", f"{name}.head_outputs"]
    before = capture(encoder, FIRST, points)
    value, plain = before[points[0]][0], before[points[1]][0]
    length = len(value)
    with patch(encoder, f"{name}.pattern", torch.eye(length), head=7):
        changed = capture(encoder, FIRST, points)[points[1]][0]
    assert (changed[:, 7] - value[:, 7]).abs().max() < 1e-6
    assert (changed[:, :7] == plain[:, :7]).all()
    with patch(encoder, f"{name}.pattern", torch.eye(length)[3], position=3):
        changed = capture(encoder, FIRST, points)[points[1]][0]
    assert (changed[3] - value[3]).abs().max() < 1e-6
    assert (changed[4:] == plain[4:]).all()
    with patch(encoder, f"{name}.scores", torch.eye(length) * 1e4):
        changed = capture(encoder, FIRST, points)[points[1]][0]
    assert (changed - value).abs().max() < 1e-6


def test_every_text_and_several_points(encoder):
    with patch(encoder, "layers.*.attention.pattern", lambda x: torch.full_like(x, 1 / x.shape[-1]), head=2):
        captured = capture(encoder, ["", FIRST, SECOND, FIRST], ["layers.*.attention.value", "**.head_outputs"])
    for layer in range(6):
        value, output = (captured[f"layers.{layer}.attention.{which}"] for which in ("value", "head_outputs"))
        for index in range(4):
            mean = value[index][:, 2].mean(dim=0)
            assert (output[index][:, 2] - mean).abs().max() < 1e-5


# Ablations.


def test_zero(encoder, reference):
    with ablate(encoder, "layers.3.attention.head_outputs", head=5):
        ablated = vectors(encoder, FIRST)[0]
    change = at((..., HEAD_5), 0)
    expected = reference(FIRST, "encoder.layer.3.attention.output.dense", change, inputs=True)
    assert (ablated - expected).abs().max() <= LIMIT


def test_mean(encoder, reference):
    """Over all tokens of all source texts, each counted once."""
    name = "layers.3.attention.head_outputs"
    rows = torch.cat([capture(encoder, text, name)[name][0] for text in (SECOND, "Rain.")])
    with ablate(encoder, name, "mean", source=[SECOND, "Rain."], head=5):
        ablated = vectors(encoder, FIRST)[0]
    change = at((..., HEAD_5), rows[:, 5].mean(dim=0))
    expected = reference(FIRST, "encoder.layer.3.attention.output.dense", change, inputs=True)
    assert (ablated - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("source", ["Rain.", SECOND], ids=["shorter", "longer"])
def test_resample(encoder, reference, source):
    """Position by position; past the source's end, its [SEP]'s."""
    name = "layers.2.feed_forward.output"
    lent = capture(encoder, source, name)[name][0]
    length = len(encoder.tokenizer(FIRST))
    rows = torch.stack([lent[min(position, len(lent) - 1)] for position in range(length)])
    assert (len(lent) < length) == (source == "Rain.")
    with ablate(encoder, name, "resample", source=source):
        ablated = vectors(encoder, FIRST)[0]
    expected = reference(FIRST, "encoder.layer.2.output.dense", lambda _: rows[None])
    assert (ablated - expected).abs().max() <= LIMIT
    with ablate(encoder, name, "resample", source=source, position=4):
        ablated = vectors(encoder, FIRST)[0]
    expected = reference(FIRST, "encoder.layer.2.output.dense", at((0, 4), rows[4]))
    assert (ablated - expected).abs().max() <= LIMIT


def test_of_a_whole_text(encoder):
    lent = vectors(encoder, SECOND, "Rain.")
    for how, source, expected in (("resample", SECOND, lent[0]), ("mean", [SECOND, "Rain."], lent.mean(dim=0))):
        with ablate(encoder, "embedding", how, source=source):
            assert (vectors(encoder, FIRST)[0] - expected).abs().max() < 1e-6
    with ablate(encoder, "pooled"):
        assert (vectors(encoder, FIRST) == 0).all()


# Nesting.


def test_an_inner_patch_sees_what_an_outer_one_put_there(encoder):
    name = "layers.0.output"
    with patch(encoder, name, 3.0), patch(encoder, name, lambda x: 2 * x, position=1):
        value = capture(encoder, FIRST, name)[name][0]
        assert (value[1] == 6).all()
        assert (value[2:] == 3).all()
        with patch(encoder, name, lambda x: x + 1):
            assert (capture(encoder, FIRST, name)[name][0][1] == 7).all()
        assert (capture(encoder, FIRST, name)[name][0] == value).all()
    with patch(encoder, name, lambda x: 2 * x), patch(encoder, name, 3.0):
        assert (capture(encoder, FIRST, name)[name][0] == 3).all()


def test_patches_of_different_points_join(encoder, reference):
    with patch(encoder, "layers.5.output", 0.5, position=0), ablate(encoder, "layers.5.output", position=1):
        captured = capture(encoder, FIRST, "layers.5.output")["layers.5.output"][0]
    assert (captured[0] == 0.5).all()
    assert (captured[1] == 0).all()
    with ablate(encoder, "layers.2.feed_forward.output"), patch(encoder, "embeddings.token_type", lambda x: x):
        joined = vectors(encoder, FIRST)[0]
    expected = reference(FIRST, "encoder.layer.2.output.dense", torch.zeros_like)
    assert (joined - expected).abs().max() <= LIMIT


def test_what_an_ablation_takes_is_taken_of_the_model_as_patched(encoder):
    name = "layers.1.output"
    with patch(encoder, name, 3.0), ablate(encoder, name, "mean", source=SECOND):
        assert (capture(encoder, FIRST, name)[name][0] == 3).all()


# Errors, and what is left of them.

OUTPUT, HEADS, PATTERN = "layers.1.output", "layers.1.attention.head_outputs", "layers.1.attention.pattern"
REFUSED = {  # on entering the block
    "unknown point": (patch, ("layers.1.outptu", 0.0), {}, "did you mean layers.1.output"),
    "no heads there": (patch, (OUTPUT, 0.0), {"head": 1}, r"layers\.1\.output \[L C\] has no heads to choose from"),
    "no such head": (patch, (HEADS, 0.0), {"head": 12}, "head must be from 0 to 11, got 12"),
    "no such head from the end": (patch, (HEADS, 0.0), {"head": -13}, "head must be from 0 to 11, got -13"),
    "no positions there": (patch, ("pooled", 0.0), {"position": 0}, "has no positions to choose from, got position 0"),
    "unknown way": (ablate, (OUTPUT, "remove"), {}, "how must be one of zero, mean, resample; got 'remove'"),
    "a source for nothing": (ablate, (OUTPUT,), {"source": FIRST}, "zero ablation takes no source"),
    "no source": (ablate, (OUTPUT, "mean"), {}, "mean ablation takes source texts, got none"),
    "many sources": (ablate, (OUTPUT, "resample"), {"source": [FIRST, SECOND]}, "takes one source text, got 2"),
    "a pattern's mean": (ablate, (PATTERN, "mean"), {"source": FIRST}, "has a column for each token; use zero"),
    "a source too long": (ablate, (OUTPUT, "mean"), {"source": "one " * 200}, "202 tokens, more than the limit of 128"),
}
FAILING = {  # while encoding
    "no such position": ((OUTPUT, 0.0), {"position": 9}, "has no position 9 in a text of 9 tokens"),
    "no such position from the end": ((PATTERN, 0.0), {"position": -10}, "has no position -10 in a text of 9 tokens"),
    "wrong width": ((OUTPUT, torch.zeros(383)), {}, r"layers.1.output takes \[9, 384\] of this text, got \[383\]"),
    "wrong length": ((OUTPUT, torch.zeros(8, 384)), {}, r"takes \[9, 384\] of this text, got \[8, 384\]"),
    "wrong head": ((HEADS, torch.zeros(9, 384)), {"head": 3}, r"takes \[9, 32\] of this text, got \[9, 384\]"),
    "wrong row": ((PATTERN, torch.zeros(8)), {"position": 3}, r"takes \[12, 9\] of this text, got \[8\]"),
    "a function's shape": ((OUTPUT, lambda x: x[:5]), {}, r"takes \[9, 384\] of this text, got \[5, 384\]"),
    "a function's own error": ((OUTPUT, lambda x: x.nothing), {}, "nothing"),
}


@pytest.fixture
def restored(encoder):
    """The encoder, which at the end must compute the same bits by the same backend."""
    before = vectors(encoder, FIRST, SECOND), encoder.model.backend, encoder.model.backend_choices
    yield encoder
    assert encoder.model.backend is before[1]
    assert encoder.model.backend_choices == before[2]
    assert (vectors(encoder, FIRST, SECOND) == before[0]).all()


@pytest.mark.parametrize(("block", "arguments", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_at_once(restored, block, arguments, options, message):
    kind = UnknownPointError if "did you mean" in message else ValueError
    with pytest.raises(kind, match=message), block(restored, *arguments, **options):
        pytest.fail("entered")


@pytest.mark.parametrize(("arguments", "options", "message"), FAILING.values(), ids=FAILING.keys())
def test_failing_while_it_encodes(restored, arguments, options, message):
    assert len(restored.tokenizer("The old man sleeps in the garden")) == 9
    with patch(restored, *arguments, **options):
        with pytest.raises((ValueError, AttributeError), match=message):
            restored.encode("The old man sleeps in the garden")
        with pytest.raises((ValueError, AttributeError), match=message):  # and again, the block being there still
            capture(restored, "The old man sleeps in the garden", "embeddings")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whatever_happens_inside(restored, error):
    def fail(_):
        raise error

    with pytest.raises(error), ablate(restored, "layers.2.**"), patch(restored, "pooled", fail):
        restored.encode(FIRST)


def test_a_text_too_long(restored):
    with patch(restored, "pooled", 1.0), pytest.raises(ValueError, match="202 tokens, more than the limit of 128"):
        capture(restored, "one " * 200)


def test_a_generator_that_is_never_finished(restored):
    def patched():
        with patch(restored, "pooled", 1.0):
            yield restored.encode(FIRST)

    generator = patched()
    assert (next(generator) == restored.encode(SECOND)).all()  # nothing but the patch
    generator.close()


def test_blocks_that_end_in_another_order(own_encoder):
    """As blocks of several threads or generators do."""
    plain = vectors(own_encoder, FIRST)
    first = patch(own_encoder, "layers.5.output", 1.0, position=0)
    second = patch(own_encoder, "layers.5.output", 2.0, position=1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    value = capture(own_encoder, FIRST, "layers.5.output")["layers.5.output"][0]
    assert (value[1] == 2).all()
    assert (value[0] != 1).any()
    second.__exit__(None, None, None)
    assert (vectors(own_encoder, FIRST) == plain).all()


def test_other_threads_are_patched_as_well(restored):
    seen = []
    with ablate(restored, "layers.2.feed_forward.output"):
        here = restored.encode(FIRST)
        threads = [threading.Thread(target=lambda: seen.append(restored.encode(FIRST))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = restored.encode([FIRST, SECOND], deterministic=True)[0]  # in several threads of its own
    assert len(seen) == 3
    assert all(abs(vector - here).max() < 1e-6 for vector in (*seen, alone))
    assert abs(restored.encode(FIRST) - here).max() > 1e-3


# Gradients.


@pytest.fixture(scope="module")
def exact(canonical_folder):
    return minilm.load(canonical_folder, device="cpu", dtype="float64")


@pytest.mark.parametrize(
    ("point", "place", "shape"),
    [
        ("layers.2.output", {"position": 3}, (384,)),
        ("layers.0.attention.head_outputs", {"head": 4}, (32,)),
        ("layers.4.attention.pattern", {"head": 1, "position": 2}, (10,)),
    ],
)
def test_gradients_through_patched_values(exact, point, place, shape):
    """Against central differences, in float64, along random directions."""
    torch.manual_seed(0)
    value = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    other = capture(exact, SECOND, []).embeddings[0]
    assert len(exact.tokenizer(FIRST)) == 10

    def score(value, gradients=False):
        with patch(exact, point, value, **place):
            return capture(exact, FIRST, [], gradients=gradients).embeddings[0] @ other

    (gradient,) = torch.autograd.grad(score(value, gradients=True), value)
    for _ in range(3):
        direction = torch.randn(shape, dtype=torch.float64)
        ends = [score(value.detach() + step * direction) for step in (1e-4, -1e-4)]
        assert float(gradient @ direction) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-9)
    assert gradient.abs().max() > 1e-6


def test_gradients_through_functions_and_past_patches(exact):
    """A function scales what is there, a patch changes a position later on: the derivative by the scale."""
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    other = capture(exact, SECOND, []).embeddings[0]

    def score(scale, gradients=False):
        with (
            patch(exact, "layers.*.feed_forward.output", lambda x: scale * x),
            patch(exact, "layers.3.output", 0.5, position=2),
        ):
            return capture(exact, FIRST, [], gradients=gradients).embeddings[0] @ other

    (gradient,) = torch.autograd.grad(score(scale, gradients=True), scale)
    expected = (score(0.7 + 1e-5) - score(0.7 - 1e-5)) / 2e-5
    assert float(gradient) == pytest.approx(float(expected), rel=1e-6)
