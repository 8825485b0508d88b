"""Where does word order enter?

Two sentences of the same words in different roles ("The dog bites the man.", "The man bites the dog.") differ for the
model by its position embeddings alone: without them a transformer with mean pooling sees a bag of words, and their
cosine is 1. So the study asks at each layer how far the two have come apart, how far the word has that changed its
role, and what is left of the difference at the end if that layer's attention is blind to order: if every head of the
layer looks where it would look had there been no position embeddings. The same content in the passive voice, in other
words and order, is what the difference is to be measured by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minilm.encoder import SentenceEncoder
from minilm.internals import plots
from minilm.internals.captures import capture
from minilm.internals.lens import layer_embeddings
from minilm.internals.patches import ablate, patch
from minilm.internals.points import hidden_state_labels, hidden_states
from minilm.internals.studies.result import StudyResult
from minilm.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENTS = (  # who, does what, to whom; all single word pieces, so that both orders have the same tokens
    ("dog", "bites", "man", "bitten"),
    ("teacher", "praised", "student", "praised"),
    ("cat", "chased", "horse", "chased"),
    ("doctor", "called", "lawyer", "called"),
    ("girl", "pushed", "boy", "pushed"),
    ("king", "killed", "soldier", "killed"),
    ("driver", "hit", "cyclist", "hit"),
    ("mother", "kissed", "baby", "kissed"),
    ("police", "attacked", "crowd", "attacked"),
    ("company", "sued", "bank", "sued"),
)
COLUMNS = ("roles swapped", "in the passive", "the word itself", "no positions", "blind here")


def run(encoder: SentenceEncoder, *, show_progress_bar: bool | None = None) -> StudyResult:
    """Compare sentences whose words have swapped roles.

    Args:
        encoder: whose.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.
    """
    first = [f"The {who} {does} the {whom}." for who, does, whom, _ in EVENTS]
    second = [f"The {whom} {does} the {who}." for who, does, whom, _ in EVENTS]
    passive = [f"The {whom} was {done} by the {who}." for who, _, whom, done in EVENTS]
    lens = layer_embeddings(encoder, [*first, *second, *passive])
    with ablate(encoder, "embeddings.position"):
        without = layer_embeddings(encoder, [*first, *second])
    swapped, alike = lens.cosines(first, second), lens.cosines(first, passive)
    unordered = without.cosines(first, second)
    words = _word_cosines(encoder, first, second)
    *_, last = lens.pooled
    rows = {}
    with progress_bar(show_progress_bar, encoder.config.num_layers, "word order", "layer") as advance:
        for place, point in enumerate(lens.pooled):
            blind = swapped[last].mean() if not place else _cosine_when_blind(encoder, first, second, place - 1)
            means = (swapped[point].mean(), alike[point].mean(), words[place], unordered[point].mean(), blind)
            rows[point] = [float(mean) for mean in means]
            advance(min(1, place))
    gap = 1 - rows[last][0]
    closed = {point: (numbers[4] - rows[last][0]) / gap for point, numbers in rows.items()}
    findings = [
        f"With roles swapped the cosine is {rows[last][0]:.3f}, in the passive {rows[last][1]:.3f}: who does it to "
        f"whom moves a sentence {'less' if gap < 1 - rows[last][1] else 'more'} than the wording does.",
        f"Without position embeddings it is {rows[last][3]:.4f}: nothing else knows the order.",
        "Blind to order, these layers' attention takes most of the difference away: "
        + ", ".join(f"{point} {share:.0%}" for point, share in sorted(closed.items(), key=lambda item: -item[1])[:3]),
    ]

    def pictures() -> dict[str, Figure]:
        places = hidden_state_labels(encoder.config)
        curves = {name: [numbers[column] for numbers in rows.values()] for column, name in enumerate(COLUMNS[:-1])}
        shares = dict(zip(places[1:], [*closed.values()][1:], strict=True))
        title, unit = (
            "How much of the difference one layer's attention makes",
            "share that goes if it is blind to order",
        )
        return {
            "word-order-layers": plots.layers(
                curves, places, title="The same words in other roles", unit="mean cosine"
            ),
            "word-order-blind": plots.bars(shares, title=title, unit=unit),
        }

    return StudyResult("Where does word order enter?", COLUMNS, rows, findings, pictures)


def _word_cosines(encoder: SentenceEncoder, first: list[str], second: list[str]) -> list[float]:
    """Return at each layer the mean cosine of a word in one role (token 2) with itself in the other (token 5)."""
    points = hidden_states(encoder.config)
    ours, theirs = capture(encoder, first, points), capture(encoder, second, points)
    if any(len(tokens) != 8 for tokens in (*ours.tokens, *theirs.tokens)):  # five words, a full stop, and the frame
        raise ValueError("these sentences are for a vocabulary that has all their words as single word pieces")
    pairs = {point: zip(ours[point], theirs[point], strict=True) for point in points}
    return [
        float(torch.stack([torch.cosine_similarity(a[2], b[5], dim=0) for a, b in pairs[point]]).mean())
        for point in points
    ]


def _cosine_when_blind(encoder: SentenceEncoder, first: list[str], second: list[str], layer: int) -> float:
    """Return the mean cosine when one layer's heads look where they would without position embeddings."""
    point = f"layers.{layer}.attention.pattern"
    with ablate(encoder, "embeddings.position"):
        patterns = capture(encoder, [*first, *second], point)[point]
    vectors = []
    for text, pattern in zip([*first, *second], patterns, strict=True):
        with patch(encoder, point, pattern):
            vectors.append(capture(encoder, text, []).embeddings[0])
    ours, theirs = torch.stack(vectors).chunk(2)
    return float(torch.cosine_similarity(ours, theirs).mean())
