"""Why two texts score as they do, in one HTML file that needs nothing else, as pictures, and as text.

`explain` puts together what the other files here find out: attention (`capture`), the exact decomposition by component
(`decomposition`), the attribution to pairs of tokens (`attribution`) and the similarity layer by layer (`lens`).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minilm import __version__
from minilm.encoder import SentenceEncoder
from minilm.internals.attribution import SimilarityAttribution, attribute_similarity
from minilm.internals.captures import Captured, capture
from minilm.internals.decomposition import PairDecomposition, decompose_pair
from minilm.internals.lens import layer_similarities
from minilm.internals.points import hidden_state_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"cosine": "cosine similarity", "dot": "inner product"}
SHOWN = 8  # rows of each part of a table
ATTRIBUTION_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found out.

    Attributes:
        model: the model's name.
        attribution: the score by pairs of tokens.
        decomposition: the score by components.
        patterns: of each text, every head's attention, `[layers, H, L, L]`.
        layers: the cosine of the two texts if the model ended there: `embeddings`, `layer 0`, ...
    """

    model: str
    attribution: SimilarityAttribution
    decomposition: PairDecomposition
    patterns: tuple[Tensor, Tensor]
    layers: Mapping[str, float]

    @property
    def texts(self) -> tuple[str, str]:
        """The two texts."""
        return self.decomposition.first.text, self.decomposition.second.text

    @property
    def tokens(self) -> tuple[list[str], list[str]]:
        """Their word pieces."""
        return self.decomposition.first.tokens, self.decomposition.second.tokens

    @property
    def metric(self) -> str:
        """`cosine` or `dot`."""
        return self.decomposition.metric

    @property
    def score(self) -> float:
        """The score of the embeddings that the model returned."""
        return self.decomposition.score

    @cached_property
    def components(self) -> dict[str, float]:
        """What each component adds to the score; see `PairDecomposition.shares`."""
        return self.decomposition.shares

    def table(self) -> str:
        """Return what pushed the score as text: pairs of tokens, components, layers."""
        (first, second), pairs = map(_told_apart, self.tokens), self.attribution.score_by_token.tolist()
        meetings = {f"{own} x {other}": pairs[i][j] for i, own in enumerate(first) for j, other in enumerate(second)}
        exact = f"sum {sum(self.components.values()):.4f}, residual {self.decomposition.residual:.1e}"
        attributed = f"sum {sum(meetings.values()):.4f}, residual {self.attribution.residual:.1e}"
        return "\n".join(
            [
                f"{self.metric} {self.score:.4f}",
                *("", f"pairs of tokens ({attributed})", *_largest(meetings)),
                *("", f"components of the model ({exact})", *_largest(self.components)),
                *("", "cosine if the model ended there"),
                *(f"{value:+9.4f}  {name}" for name, value in self.layers.items()),
            ]
        )

    @property
    def reference(self) -> str:
        """The token that both texts' attributions start from."""
        inner = set(self.attribution.first.reference_tokens[1:-1])
        return inner.pop() if len(inner) == 1 else "the reference"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures but the attention patterns, in types that JSON has."""
        attribution = self.attribution
        return {
            "model": self.model,
            "metric": self.metric,
            "score": self.score,
            "sentences": [{"text": t, "tokens": pieces} for t, pieces in zip(self.texts, self.tokens, strict=True)],
            "pair": {
                "values": [[round(value, 6) for value in row] for row in attribution.score_by_token.tolist()],
                "point": attribution.first.point,
                "reference": self.reference,
                "sum": float(attribution.score_by_token.sum()),
                "residual": attribution.residual,
            },
            "components": {
                "values": self.components,
                "sum": sum(self.components.values()),
                "residual": self.decomposition.residual,
            },
            "layers": dict(self.layers),
        }

    def page(self) -> str:
        """Return the HTML page, whole: it loads nothing from anywhere.

        What the texts hold is data throughout: it is put on the page as text, and the page's policy lets no script run
        but its own, and nothing be fetched.
        """
        style, script = _part("style.css"), _part("script.js")
        attention = {"shape": list(self.patterns[0].shape[:2]), "patterns": [_in_255ths(p) for p in self.patterns]}
        data = {**self.to_dict(), "measure": MEASURES[self.metric], "version": __version__, "attention": attention}
        values = {
            "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_sha256(script)}'",
            "version": __version__,
            "title": html.escape(f"{self.score:.4f}: {' / '.join(self.texts)}"),
            "style": style,
            "script": script,
            "data": _json_in_html(data),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda name: values[name[1]], _part("page.html"))

    def pictures(self) -> dict[str, Figure]:
        """Return the page's pictures by name, as matplotlib figures.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from minilm.internals import plots

        adds, ends = f"adds to the {MEASURES[self.metric]}", list(self.layers.values())
        looks = [f"Where each head looks: {shorten(text, 90, placeholder='…')}" for text in self.texts]
        return {
            "tokens": plots.grid(self.attribution.score_by_token, *self.tokens, title="Which tokens meet", unit=adds),
            "components": plots.components(self.components, title="Which parts of the model push", unit=adds),
            "attention-first": plots.heads(self.patterns[0], title=looks[0]),
            "attention-second": plots.heads(self.patterns[1], title=looks[1]),
            "layers": plots.layers({"": ends}, list(self.layers), title="Layer by layer", unit="cosine"),
        }

    def __repr__(self) -> str:
        """Say what of."""
        return f"Explanation({self.texts[0]!r}, {self.texts[1]!r}: {self.metric} {self.score:.4f})"


def explain(
    encoder: SentenceEncoder,
    first: str,
    second: str,
    *,
    metric: str = "cosine",
    point: str = "embeddings",
    show_progress_bar: bool | None = None,
) -> Explanation:
    """Find out why two texts score as they do.

    The attribution to pairs of tokens is what takes time, seconds to minutes for long texts; from a later point (as
    `layers.2.output`) it is faster.

    Args:
        encoder: whose; patches in force are seen.
        first: a text.
        second: a text.
        metric: `cosine` or `dot`.
        point: where the attribution to tokens starts: `embeddings`, the input, or `layers.K.output`.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: a text too long, or another metric or point.
    """
    decomposition = decompose_pair(encoder, first, second, metric)
    captured = capture(encoder, [first, second], "layers.*.attention.pattern")
    similarities = layer_similarities(encoder, first, second).figure("cosine")
    layers = dict(zip(hidden_state_labels(encoder.config), similarities, strict=True))
    options: dict[str, Any] = {
        "metric": metric,
        "tolerance": ATTRIBUTION_TOLERANCE,
        "show_progress_bar": show_progress_bar,
    }
    attribution = attribute_similarity(encoder, first, second, point, **options)
    model = str(encoder.checkpoint.provenance.get("source") or "a model")
    patterns = _patterns(captured, 0), _patterns(captured, 1)
    return Explanation(model, attribution, decomposition, patterns, layers)


def _patterns(captured: Captured, text: int) -> Tensor:
    """Return the attention of all heads in one text, `[layers, H, L, L]`."""
    layers = range(captured.config.num_layers)
    return torch.stack([captured[f"layers.{layer}.attention.pattern"][text].float().cpu() for layer in layers])


def _told_apart(tokens: Sequence[str]) -> list[str]:
    """Return tokens of which those that occur more than once are followed by their position."""
    return [f"{token} ({place})" if tokens.count(token) > 1 else token for place, token in enumerate(tokens, start=1)]


def _largest(values: Mapping[str, float]) -> list[str]:
    """Return the largest of some named numbers, a line each."""
    chosen = sorted(values.items(), key=lambda item: -abs(item[1]))[:SHOWN]
    return [f"{value:+9.4f}  {name}" for name, value in chosen]


def _in_255ths(weights: Tensor) -> str:
    """Return weights from 0 to 1 as a byte each, in base64."""
    return base64.b64encode((weights * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def _part(name: str) -> str:
    """Return a file that the page is made of."""
    return (files("minilm.internals") / "page" / name).read_text(encoding="utf-8")


def _json_in_html(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def _sha256(text: str) -> str:
    """Return what a content security policy calls a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
