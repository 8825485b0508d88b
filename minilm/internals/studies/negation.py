"""What happens to "not"?

A sentence is compared with its negation, and, as a measure of what any added word does, with the same sentence that has
another word in the place of "not". Layer by layer (the embedding lens), and at the end by component: the exact
decompositions of both cosines, one subtracted from the other, say which parts of the model tell the two words apart.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from minilm.encoder import SentenceEncoder
from minilm.internals import plots
from minilm.internals.decomposition import decompose_pair
from minilm.internals.lens import layer_embeddings
from minilm.internals.points import hidden_state_labels
from minilm.internals.studies.result import StudyResult
from minilm.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A sentence with a gap: with nothing in it, with "not", and with another word.
SENTENCES = (
    ("The film was {}good.", "very"),
    ("He is {}at home.", "still"),
    ("The door is {}open.", "also"),
    ("The answer is {}correct.", "surely"),
    ("They have {}finished the work.", "just"),
    ("The train will {}arrive today.", "surely"),
    ("You should {}swim in this lake.", "often"),
    ("The soup was {}hot.", "quite"),
    ("The child is {}sleeping.", "still"),
    ("We were {}happy with the result.", "very"),
    ("It has {}rained here this week.", "often"),
    ("The bridge is {}safe.", "quite"),
)


def run(encoder: SentenceEncoder, *, show_progress_bar: bool | None = None) -> StudyResult:
    """Compare sentences with their negations.

    Args:
        encoder: whose.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.
    """
    plain = [sentence.format("") for sentence, _ in SENTENCES]
    negated = [sentence.format("not ") for sentence, _ in SENTENCES]
    varied = [sentence.format(f"{word} ") for sentence, word in SENTENCES]
    others = {'with "not"': negated, "with another word": varied, "another sentence": [*plain[1:], plain[0]]}
    lens = layer_embeddings(encoder, [*plain, *negated, *varied])
    cosines = {name: lens.cosines(plain, texts) for name, texts in others.items()}
    rows = {point: [float(column[point].mean()) for column in cosines.values()] for point in lens.pooled}
    pushes: Counter[str] = Counter()
    with progress_bar(show_progress_bar, len(plain), "negation", "sentence") as advance:
        for sentence, negation, other in zip(plain, negated, varied, strict=True):
            for text, sign in ((negation, 1), (other, -1)):
                shares = decompose_pair(encoder, sentence, text).shares
                pushes.update({name: sign * share / len(plain) for name, share in shares.items()})
            advance(1)
    *_, last = rows
    closer = (cosines['with "not"'][last] > cosines["with another word"][last]).sum()
    strongest = sorted(pushes.items(), key=lambda item: -abs(item[1]))[:6]
    findings = [
        f"A sentence and its negation have a cosine of {rows[last][0]:.3f}, with another word in its place "
        f"{rows[last][1]:.3f}; two of these sentences {rows[last][2]:.3f}.",
        f"The negation is the closer of the two in {closer} of {len(plain)} sentences.",
        f"The difference, {sum(pushes.values()):+.4f}, by component: "
        + ", ".join(f"{name} {value:+.4f}" for name, value in strongest),
    ]

    def pictures() -> dict[str, Figure]:
        places = hidden_state_labels(encoder.config)
        curves = {name: [numbers[column] for numbers in rows.values()] for column, name in enumerate(others)}
        title, unit = 'What parts "not" from another word', "difference of mean cosines"
        return {
            "negation-layers": plots.layers(
                curves, places, title="A sentence, and with a word more", unit="mean cosine"
            ),
            "negation-components": plots.components(pushes, title=title, unit=unit),
        }

    return StudyResult('What happens to "not"?', list(others), rows, findings, pictures)
