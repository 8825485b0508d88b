"""Grids and paths in one call give what explicit runs, one patch at a time, give."""

from contextlib import ExitStack

import pytest
import torch

from minilm.internals import UnknownPointError, capture, patch
from minilm.internals.causal import components
from minilm.internals.paths import cosine_to, patching_grid, path_effects

CLEAN, CORRUPTED = "The old dog sleeps in the garden.", "The old bus stops in the tunnel."
OTHER = "A puppy is asleep outside."
LIMIT = 2e-6  # in cosines, of float32; shares are those over the distance between the scores
HEADS, UPDATES = "layers.*.attention.head_outputs", "layers.*.feed_forward.output"


def cosine(encoder, text, other):
    vector = torch.from_numpy(encoder.encode(text)).double()
    return float(vector @ other / vector.norm() / other.norm())


@pytest.fixture(scope="module")
def clean(encoder):
    """Every value of the clean text."""
    return capture(encoder, CLEAN)


@pytest.fixture(scope="module")
def corrupted(encoder):
    return capture(encoder, CORRUPTED)


@pytest.fixture(scope="module")
def share(encoder, clean):
    """Of the corrupted text, as the model now is: how much of the way to the clean text's cosine to a vector."""
    vectors = {None: clean.embeddings[0].double(), OTHER: torch.from_numpy(encoder.encode(OTHER)).double()}
    ends = {other: [cosine(encoder, text, vector) for text in (CORRUPTED, CLEAN)] for other, vector in vectors.items()}

    def measured(other=None):
        low, high = ends[other]
        return (cosine(encoder, CORRUPTED, vectors[other]) - low) / (high - low)

    return measured


# Grids.


@pytest.mark.parametrize(
    "points",
    [
        None,
        ["layers.0.attention.output", "layers.5.feed_forward.activation", "embeddings.word"],
        ["layers.1.attention.query", "layers.4.attention.head_outputs"],
        ["layers.2.attention.pattern"],
    ],
)
def test_position_by_position(encoder, clean, share, points):
    grid = patching_grid(encoder, CLEAN, CORRUPTED, points)
    assert grid.shares.shape == (len(grid.rows), 9 + 1)
    for point, row in zip(grid.rows, grid.shares, strict=True):
        for position, found in enumerate(row.tolist()):
            value = clean[point][0]
            value = value[:, position] if "pattern" in point else value[position]
            with patch(encoder, point, value, position=position):
                assert found == pytest.approx(share(), abs=2 * LIMIT / (grid.clean - grid.corrupted)), (point, position)
    assert grid.shares.abs().max() > 1e-3


@pytest.mark.parametrize("points", [None, ["layers.1.attention.pattern", "layers.3.attention.value"]])
def test_head_by_head(encoder, clean, share, points):
    """With the score of a pair."""
    grid = patching_grid(encoder, CLEAN, CORRUPTED, points, by="head", metric=cosine_to(encoder, OTHER))
    assert grid.columns == tuple(f"head {head}" for head in range(12))
    assert grid.rows == tuple(points or [f"layers.{layer}.attention.head_outputs" for layer in range(6)])
    for point, row in zip(grid.rows, grid.shares, strict=True):
        for head, found in enumerate(row.tolist()):
            value = clean[point][0]
            value = value[head] if "pattern" in point else value[:, head]
            with patch(encoder, point, value, head=head):
                expected = share(OTHER)
            assert found == pytest.approx(expected, abs=2 * LIMIT / (grid.clean - grid.corrupted)), (point, head)
    assert grid.shares.abs().max() > 0.01


def test_where_texts_do_not_differ_there_is_nothing_to_restore(encoder):
    """One word differs: before the first layer, it alone restores everything."""
    grid = patching_grid(encoder, "The old dog sleeps.", "The old cat sleeps.")
    assert grid.rows == ("embeddings", *(f"layers.{layer}.output" for layer in range(6)))
    assert grid.columns == ("0 [CLS]", "1 the", "2 old", "3 cat > dog", "4 sleeps", "5 .", "6 [SEP]")
    expected = torch.zeros(7, dtype=torch.float64)
    expected[3] = 1
    assert (grid.shares[0] - expected).abs().max() < 1e-5
    assert grid.shares[6].min() > 0.01  # in the end, all tokens know of it
    assert grid.clean == pytest.approx(1)
    assert grid.ranked()[0] == ("embeddings, 3 cat > dog", pytest.approx(1, abs=1e-3))


def test_the_order_of_texts_is_the_direction(encoder):
    """What breaks the clean text's score, too."""
    vectors = torch.from_numpy(encoder.encode([CLEAN, CORRUPTED, OTHER])).double()
    metric = cosine_to(encoder, OTHER)
    there, back = (patching_grid(encoder, *texts, metric=metric) for texts in ((CLEAN, CORRUPTED), (CORRUPTED, CLEAN)))
    assert there.clean == pytest.approx(float(vectors[0] @ vectors[2]), abs=LIMIT)
    assert (there.clean, there.corrupted) == (back.corrupted, back.clean)
    assert (there.shares - back.shares).abs().max() > 0.01


def test_in_several_batches(encoder, monkeypatch):
    whole = patching_grid(encoder, CLEAN, CORRUPTED), path_effects(encoder, CLEAN, CORRUPTED)
    monkeypatch.setattr("minilm.internals.paths.TOKENS_AT_ONCE", 35)  # three copies
    parts = patching_grid(encoder, CLEAN, CORRUPTED), path_effects(encoder, CLEAN, CORRUPTED)
    for found, expected in zip(parts, whole, strict=True):
        assert (found.shares - expected.shares).abs().max() < 1e-5


def test_any_metric(encoder):
    grid = patching_grid(encoder, CLEAN, CORRUPTED, "embeddings", metric=lambda vectors: vectors[:, 7])
    ends = encoder.encode([CLEAN, CORRUPTED])[:, 7]
    assert (grid.clean, grid.corrupted) == pytest.approx(tuple(ends), abs=LIMIT)


def test_grids_laid_out(encoder):
    grid = patching_grid(encoder, CLEAN, CORRUPTED, "layers.2.attention.head_outputs", by="head")
    lines = grid.table().splitlines()
    assert lines[0].startswith(f"shares of the way from {grid.corrupted:.4f} (corrupted) to 1.0000 (clean)")
    assert lines[3].split()[1:] == [f"{100 * share:.0f}" for share in grid.shares[0].tolist()]


# Paths.


def explicit(encoder, clean, corrupted, sender, receivers, freeze_feed_forwards, inputs, share):
    """One sender's share: a first run with all else frozen, a second in which receivers read what they did in it."""
    frozen = [name for name in clean.activations if name.endswith("attention.head_outputs")]
    frozen += [name for name in clean.activations if name.endswith("feed_forward.output") and freeze_feed_forwards]
    places = []
    for layer, head in receivers:
        attention = [f"layers.{layer}.attention.{which}" for which in inputs]
        places += [
            (point, head) for point in ([f"layers.{layer}.feed_forward.pre_activation"] if head is None else attention)
        ]
    with ExitStack() as first:
        for name in frozen:
            first.enter_context(patch(encoder, name, corrupted[name][0]))
        sent = clean[sender.point][0]
        sent = sent if sender.head is None else sent[:, sender.head]
        first.enter_context(patch(encoder, sender.point, sent, head=sender.head))
        if not receivers:
            return share()
        read = capture(encoder, CORRUPTED, {point for point, _ in places})
    with ExitStack() as second:
        for point, head in places:
            value = read[point][0]
            second.enter_context(patch(encoder, point, value if head is None else value[:, head], head=head))
        return share()


PATHS = {
    "to the embedding": ("embedding", True, ["query", "key", "value"]),
    "to the embedding, through feed-forwards": ("embedding", False, ["query", "key", "value"]),
    "to a head": ("layers.3.attention.heads.10", True, ["query", "key", "value"]),
    "to heads' values": (["layers.4.attention.heads.4", "layers.5.attention.heads.3"], False, ["value"]),
    "to all heads of a layer": ("layers.4.attention.heads.*", True, ["key", "value"]),
    "to a feed-forward and a head": (
        ["layers.2.feed_forward", "layers.4.attention.heads.10"],
        True,
        ["query", "value"],
    ),
}


@pytest.mark.parametrize(("receivers", "freeze", "inputs"), PATHS.values(), ids=PATHS.keys())
def test_paths_against_explicit_runs(encoder, clean, corrupted, share, receivers, freeze, inputs):
    senders = ["layers.*.attention.heads.[37]", "layers.*.feed_forward"]
    effects = path_effects(
        encoder, CLEAN, CORRUPTED, senders, receivers, freeze_feed_forwards=freeze, inputs=inputs
    )  # fmt: skip
    receiving = [] if receivers == "embedding" else components(encoder.config, receivers)
    sending = components(encoder.config, senders)
    assert effects.senders == tuple(sender.name for sender in sending)
    assert effects.receivers == (tuple(receiver.name for receiver in receiving) or ("embedding",))
    for sender, found in zip(sending, effects.shares.tolist(), strict=True):
        expected = explicit(encoder, clean, corrupted, sender, receiving, freeze, inputs, share)
        assert found == pytest.approx(expected, abs=2 * LIMIT / (effects.clean - effects.corrupted)), sender.name
        if receiving and sender.layer > receiving[-1].layer:
            assert abs(found) < 1e-5  # it comes too late
    assert effects.shares.abs().max() > 1e-3


def test_the_last_components_have_no_other_paths(encoder, clean, share):
    """So a path to the embedding is all that patching them does."""
    last = path_effects(encoder, CLEAN, CORRUPTED, "layers.5.**", freeze_feed_forwards=False)
    grid = patching_grid(encoder, CLEAN, CORRUPTED, "layers.5.attention.head_outputs", by="head")
    assert (last.shares[:12] - grid.shares[0]).abs().max() < 1e-5
    with patch(encoder, "layers.5.feed_forward.output", clean["layers.5.feed_forward.output"][0]):
        assert float(last.shares[12]) == pytest.approx(share(), abs=1e-5)


def test_paths_of_a_pair_and_laid_out(encoder, clean, share):
    effects = path_effects(encoder, CLEAN, CORRUPTED, "layers.5.feed_forward", metric=cosine_to(encoder, OTHER))
    with patch(encoder, "layers.5.feed_forward.output", clean["layers.5.feed_forward.output"][0]):
        assert float(effects.shares) == pytest.approx(share(OTHER), abs=1e-5)
    lines = effects.table().splitlines()
    assert lines[2].split() == ["paths", "to", "embedding", "from", "share"]
    assert lines[3].split() == ["layers.5.feed_forward", f"{float(effects.shares):+.4f}"]
    assert effects.ranked() == [("layers.5.feed_forward", float(effects.shares))]


def test_within_a_patch(encoder):
    """What is patched outside holds for both texts and all copies: where it makes them equal, nothing is restored."""
    with patch(encoder, "layers.4.output", lambda x: torch.zeros_like(x), position=3):
        grid = patching_grid(encoder, CLEAN, CORRUPTED, "layers.4.output")
    assert abs(float(grid.shares[0, 3])) < 1e-5
    assert abs(float(patching_grid(encoder, CLEAN, CORRUPTED, "layers.4.output").shares[0, 3])) > 1e-2


GRIDS = {
    "token counts": ((CLEAN, OTHER), {}, r"as many tokens; got 10 \(\[CLS\] the old dog .*\) and 8 \(\[CLS\] a puppy"),
    "the same text": ((CLEAN, CLEAN), {}, "the score must differ between the texts; it is 1.000000 and 1.000000"),
    "too long": (("one " * 127, "two " * 127), {}, "text 0 has 129 tokens, more than the limit of 128"),
    "unknown columns": ((CLEAN, CORRUPTED), {"by": "layer"}, "by must be one of position, head; got 'layer'"),
    "no heads": ((CLEAN, CORRUPTED, "layers.1.output"), {"by": "head"}, r"layers.1.output \[L C\] has no heads"),
    "no positions": ((CLEAN, CORRUPTED, "pooled"), {}, r"pooled \[C\] has no positions to patch one by one"),
    "unknown point": ((CLEAN, CORRUPTED, "layers.1.outptu"), {}, "did you mean layers.1.output"),
}
PATH_ERRORS = {
    "token counts": ((CLEAN, OTHER), {}, "as many tokens; got 10"),
    "end and others": ((CLEAN, CORRUPTED, "*", ["embedding", "*"]), {}, "name it alone, not with 1 others"),
    "unknown inputs": ((CLEAN, CORRUPTED), {"inputs": "values"}, "some of query, key, value; got values"),
    "no inputs": ((CLEAN, CORRUPTED), {"inputs": []}, "some of query, key, value; got none"),
    "unknown sender": ((CLEAN, CORRUPTED, "layers.1.feedforward"), {}, "did you mean layers.1.feed_forward"),
}
CASES = [(patching_grid, *case) for case in GRIDS.values()] + [(path_effects, *case) for case in PATH_ERRORS.values()]


@pytest.mark.parametrize(("function", "arguments", "options", "message"), CASES, ids=[*GRIDS, *PATH_ERRORS])
def test_bad_input_leaves_the_model_as_it_was(encoder, function, arguments, options, message):
    before, backend = encoder.encode(CLEAN), encoder.model.backend
    with pytest.raises(UnknownPointError if "did you" in message else ValueError, match=message):
        function(encoder, *arguments, **options)
    assert encoder.model.backend is backend
    assert (encoder.encode(CLEAN) == before).all()


def test_texts_are_texts(encoder):
    with pytest.raises(TypeError, match="the corrupted text to be a string, got list"):
        patching_grid(encoder, CLEAN, [CORRUPTED])


def test_a_progress_bar(encoder, capsys):
    patching_grid(encoder, CLEAN, CORRUPTED, show_progress_bar=True)
    assert "7/7" in capsys.readouterr().err
