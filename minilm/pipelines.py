"""The call of ModelScope's sentence-embedding pipeline, for code that was written against it: dict in, dict out.

    embed = pipeline("sentence-embedding", model="iic/nlp_minilm_ibkd_sentence-embedding_english-sts")
    embed({"source_sentence": ["a query"], "sentences_to_compare": ["one text", "another"]})
    # {"text_embedding": float32 array [3, C], "scores": [float, float]}

Rows, scores and options follow `modelscope.pipelines.nlp.sentence_embedding_pipeline` of ModelScope 1.40. Where that
fails by accident (`IndexError`, `KeyError`, `AssertionError`) this says what was wrong, and it takes a plain string
where that wants a list of one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from minilm.encoder import SentenceEncoder, load
from minilm.texts import Text, as_texts

logger = logging.getLogger(__name__)

TASK = "sentence-embedding"
EXPECTED = 'expected {"source_sentence": ["a text", ...], "sentences_to_compare": ["another", ...]} or a list of such'


class SentenceEmbedding(TypedDict):
    """What the pipeline returns for one input: n sources and m sentences to compare.

    `text_embedding` is a float32 array `[n + m, C]`, sources first. `scores` are the inner products of the first source
    with every other row, or empty where there is nothing to compare.
    """

    text_embedding: NDArray[np.float32]
    scores: list[float]


class SentenceEmbeddingPipeline:
    """A callable that embeds `{"source_sentence": ..., "sentences_to_compare": ...}`; see `pipeline`.

    Attributes:
        encoder: the `SentenceEncoder` that does the work.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder

    @overload
    def __call__(self, inputs: Mapping[str, Any], *, batch_size: int = 32) -> SentenceEmbedding: ...

    @overload
    def __call__(self, inputs: list[Mapping[str, Any]], *, batch_size: int = 32) -> list[SentenceEmbedding]: ...

    def __call__(
        self, inputs: Mapping[str, Any] | list[Mapping[str, Any]], *, batch_size: int = 32
    ) -> SentenceEmbedding | list[SentenceEmbedding]:
        """Embed one dict, or a list of them (a list comes back then, empty for an empty one).

        Args:
            inputs: `source_sentence` is a string or a non-empty list, `sentences_to_compare` a string, a list, `None`
                or left out. An element of a list is a string, or two strings in a list: a pair, read as one text of
                two segments. Other keys are ignored.
            batch_size: sets the token budget of a batch, as in `SentenceEncoder.encode`.

        Raises:
            TypeError: the inputs, a field or an element has another type.
            ValueError: there is no source sentence, or a text is not valid Unicode.
        """
        if isinstance(inputs, Mapping):
            return self._embed([inputs], batch_size)[0]
        if not isinstance(inputs, list):
            raise TypeError(f"{EXPECTED}; got {type(inputs).__name__}")
        return self._embed(inputs, batch_size)

    def _embed(self, inputs: list[Mapping[str, Any]], batch_size: int) -> list[SentenceEmbedding]:
        """Encode the texts of all inputs in one go, and hand each its rows."""
        parts = [_read(item) for item in inputs]
        if not parts:
            return []
        texts = [text for sources, others in parts for text in (*sources, *others)]
        rows: NDArray[np.float32] = self.encoder.encode(texts, text_pairs=True, batch_size=batch_size)
        ends = np.cumsum([len(sources) + len(others) for sources, others in parts])
        return [
            SentenceEmbedding(text_embedding=own, scores=(own[1:] @ own[0]).tolist() if others else [])
            for own, (_, others) in zip(np.split(rows, ends[:-1]), parts, strict=True)
        ]


def pipeline(
    task: str | os.PathLike[str] | None = TASK,
    model: str | os.PathLike[str] | SentenceEncoder | None = None,
    *,
    device: str | None = None,
    max_length: int | None = None,
    sequence_length: int | None = None,
    **load_options: Any,
) -> SentenceEmbeddingPipeline:
    """Build a drop-in for ModelScope's `pipeline("sentence-embedding", model=...)`.

    Args:
        task: `sentence-embedding`, as in ModelScope. May be left out: any other first argument, alone, is the model.
        model: a folder, a model's name, or an encoder loaded already; `None` is the default model.
        device: as in `load`; ModelScope's `gpu` and `gpu:N` mean CUDA where there is any, else the CPU.
        max_length: tokens kept of a text, special tokens included; the model's own limit if not given.
        sequence_length: another name of `max_length`.
        load_options: further options of `minilm.load`.

    Raises:
        ValueError: another task, two lengths that differ, or options for an encoder that is loaded already.
    """
    if task not in (None, TASK):
        if model is not None:
            raise ValueError(f"the task must be {TASK!r}, got {task!r}")
        model = task
    if max_length is not None and sequence_length is not None and max_length != sequence_length:
        raise ValueError(f"max_length and sequence_length are the same limit, got {max_length} and {sequence_length}")
    limit = sequence_length if max_length is None else max_length
    options = {"device": _device(device), "max_seq_length": limit, **load_options}
    if not isinstance(model, SentenceEncoder):
        return SentenceEmbeddingPipeline(load(model, **options))
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise ValueError(f"this model is loaded already; give {', '.join(given)} to minilm.load instead")
    return SentenceEmbeddingPipeline(model)


def _read(item: Mapping[str, Any]) -> tuple[list[Text], list[Text]]:
    """Return an input's source sentences and its sentences to compare, checked."""
    if not isinstance(item, Mapping):
        raise TypeError(f"{EXPECTED}; got {type(item).__name__} in the list")
    if item.get("source_sentence") is None:
        raise ValueError(f"the input has no source_sentence; {EXPECTED}")
    sources = _texts(item["source_sentence"], "source_sentence")
    if not sources:
        raise ValueError("source_sentence is an empty list; give at least one text")
    others = item.get("sentences_to_compare")
    return sources, [] if others is None else _texts(others, "sentences_to_compare")


def _texts(value: Any, field: str) -> list[Text]:
    """Return a field's texts; an error names the field."""
    if not isinstance(value, str | list):
        raise TypeError(f"{field} must be a string or a list of strings, got {type(value).__name__}")
    try:
        return as_texts(value, text_pairs=True)[0]
    except (TypeError, ValueError) as error:
        raise type(error)(f"in {field}: {error}") from None


def _device(name: str | None) -> str | None:
    """Translate ModelScope's device names into torch's."""
    if name is None or name.partition(":")[0] != "gpu":
        return name
    import torch

    if torch.cuda.is_available():
        return name.replace("gpu", "cuda", 1)
    logger.warning("device %r was asked for and there is no CUDA device; using the CPU", name)
    return "cpu"
