"""`check`: how exact capture, decomposition and attribution are on a model, beside the limits that they are held to."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minilm.encoder import SentenceEncoder
from minilm.internals.attribution import attribute_similarity
from minilm.internals.captures import Captured, capture
from minilm.internals.decomposition import decompose_pair
from minilm.internals.patches import ablate, patch
from minilm.internals.points import hidden_states
from minilm.progress import progress_bar
from minilm.quantization import calibration_sentences
from minilm.weights.export import export_sentence_transformers

CAPTURE_LIMIT = 5e-6
SUM_LIMIT = 1e-6
INPUT_LIMIT, LATE_LIMIT = 1e-4, 1e-6  # of an attribution from the input, and from the middle of the model on
PAIR = ("A man eats.", "Someone eats.")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: what was compared, or summed.
        error: the largest error; None where there was nothing to compare with.
        limit: what it may be.
        reason: why it was not measured.
    """

    what: str
    error: float | None
    limit: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit, or was not measured."""
        return self.error is None or self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in types that JSON has, which has no NaN."""
        error = self.error if self.error == self.error else None
        return {"what": self.what, "error": error, "limit": self.limit, "ok": self.ok, "reason": self.reason}

    @property
    def figures(self) -> str:
        """Error, limit and verdict, for a table."""
        error = "-" if self.error is None else f"{self.error:.1e}"
        verdict = f"not checked: {self.reason}" if self.error is None else "ok" if self.ok else "FAILED"
        return f"{error:<7}  {self.limit:<7.1e}  {verdict}"


def check(encoder: SentenceEncoder, *, show_progress_bar: bool | None = None) -> list[Row]:
    """Measure on ordinary sentences.

    Args:
        encoder: whose; in float32, which the limits are for.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: a model in half precision, which has no derivatives to integrate.
    """
    texts = calibration_sentences()[:8]
    parts: list[Callable[[], Iterator[Row]]] = [
        lambda: _against_transformers(encoder, texts),
        lambda: _against_encode(encoder, texts),
        lambda: _decomposition(encoder, texts),
        lambda: _attribution(encoder),
        lambda: _restored(encoder, texts),
    ]
    rows: list[Row] = []
    with progress_bar(show_progress_bar, len(parts), "check", "part") as advance:
        for part in parts:
            rows.extend(part())
            advance(1)
    return rows


def _against_transformers(encoder: SentenceEncoder, texts: Sequence[str]) -> Iterator[Row]:
    """Compare hidden states and attention with the reference implementation's, text by text."""
    names = ("hidden states against transformers, relative", "attention patterns against transformers")
    if importlib.util.find_spec("transformers") is None:
        yield from (Row(name, None, CAPTURE_LIMIT, "pip install transformers") for name in names)
        return
    from transformers import BertConfig, BertModel

    with tempfile.TemporaryDirectory() as folder:
        export_sentence_transformers(encoder.to_checkpoint().with_encoding(pooling="mean"), f"{folder}/model")
        config = BertConfig.from_pretrained(f"{folder}/model", attn_implementation="eager")
        bert = BertModel(config).eval()  # type: ignore[no-untyped-call]
        bert.load_state_dict(load_file(f"{folder}/model/model.safetensors"), strict=False)  # the pooler may be missing
    states = hidden_states(encoder.config)
    patterns = [f"layers.{layer}.attention.pattern" for layer in range(encoder.config.num_layers)]
    errors = [0.0, 0.0]
    for text in texts:  # each alone, as transformers has it
        captured = capture(encoder, text, [*states, *patterns])
        with torch.inference_mode():
            ids = torch.tensor([encoder.tokenizer(text).ids])
            found = bert(ids, output_hidden_states=True, output_attentions=True)
        errors[0] = max(errors[0], _furthest(captured, states, found.hidden_states))
        errors[1] = max(errors[1], _furthest(captured, patterns, found.attentions))
    yield from (Row(name, error, CAPTURE_LIMIT) for name, error in zip(names, errors, strict=True))


def _furthest(captured: Captured, points: Sequence[str], theirs: Sequence[Tensor]) -> float:
    """Return the largest difference of a text's tensors at some points, in units of a row's largest entry or of 1.

    Entries of hidden states reach 10, where float32 is this much coarser: transformers differs from itself, by another
    of its attentions, by up to 8e-6.
    """
    pairs = [(captured[point][0].cpu(), other[0]) for point, other in zip(points, theirs, strict=True)]
    return max(float(((a - b).abs() / b.abs().amax(dim=-1, keepdim=True).clamp(min=1)).max()) for a, b in pairs)


def _against_encode(encoder: SentenceEncoder, texts: Sequence[str]) -> Iterator[Row]:
    """Compare the last point with what `encode` returns, by whatever backend."""
    vectors = encoder.encode(list(texts), prompt="", convert_to_tensor=True)
    error = float((capture(encoder, texts, []).embeddings.float() - vectors).abs().max())
    yield Row("embedding against encode", error, CAPTURE_LIMIT)


def _decomposition(encoder: SentenceEncoder, texts: Sequence[str]) -> Iterator[Row]:
    """Add up what components and tokens contribute."""
    pairs = [decompose_pair(encoder, *pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    embeddings = max(side.residual for pair in pairs for side in (pair.first, pair.second))
    yield Row("components' sum less the embedding", embeddings, SUM_LIMIT)
    yield Row("component pairs' sum less the score", max(abs(pair.residual) for pair in pairs), SUM_LIMIT)
    yield Row("token pairs' sum less the score", max(abs(float(p.by_token.sum()) - p.score) for p in pairs), SUM_LIMIT)


def _attribution(encoder: SentenceEncoder) -> Iterator[Row]:
    """Add up what pairs of tokens contribute."""
    middle = encoder.config.num_layers // 2
    for point, limit in (("embeddings", INPUT_LIMIT), (f"layers.{middle}.output", LATE_LIMIT)):
        attribution = attribute_similarity(
            encoder, *PAIR, point, tolerance=max(1e-6, limit / 10), show_progress_bar=False
        )
        yield Row(f"attribution from {point}, its sum less what it explains", abs(attribution.residual), limit)


def _restored(encoder: SentenceEncoder, texts: Sequence[str]) -> Iterator[Row]:
    """Compare vectors before and after patches, one of them left by an error."""
    before = encoder.encode(list(texts), convert_to_tensor=True)
    with ablate(encoder, "layers.*.output"):
        encoder.encode(list(texts))
    with suppress(ZeroDivisionError), patch(encoder, "embeddings", 1.0):
        raise ZeroDivisionError
    after = encoder.encode(list(texts), convert_to_tensor=True)
    yield Row("vectors after patches less those before", float((after - before).abs().max()), 0.0)
