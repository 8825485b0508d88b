"""`SentenceEncoder`: text in, vectors out. What most people import, through `minilm.load`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm import threads
from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.embed import Embedder, EncodeOptions
from minilm.kernels.torch_backend import TorchBackend
from minilm.model import MiniLM
from minilm.quantization import quantize
from minilm.similarities import SearchHit, Vectors, search, similarity, similarity_pairwise
from minilm.texts import Texts, as_texts, check_text
from minilm.tokenizer import Tokenizer
from minilm.weights.checkpoint import Checkpoint, fingerprint
from minilm.weights.load import read_checkpoint
from minilm.weights.sources import locate


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    max_seq_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    first_hidden_state: str | None = None,
    backend: str | type[TorchBackend] = "auto",
) -> SentenceEncoder:
    """Load a model, fetching its weights first if need be.

    Args:
        name_or_path: a folder, or a name on the Hugging Face or ModelScope hub; all-MiniLM-L6-v2 by default.
        device: `cuda` where there is one, else `cpu`, by default.
        dtype: what the model computes in; vectors are float32 whatever it is.
        max_seq_length: tokens kept of a text, special tokens included; the folder's own setting (128) by default.
        pooling: see `EncodingConfig`; the folder's own setting by default.
        normalize: whether vectors get length 1; the folder's own setting by default.
        first_hidden_state: see `EncodingConfig`; the folder's own setting by default.
        backend: who computes the operations; see `minilm.kernels.backend.make_backend`.

    Raises:
        SourceError: the weights are nowhere to be had; every place tried is named.
        WeightsError: they are there, and unusable.
        ValueError: a setting out of range.
    """
    checkpoint = read_checkpoint(locate(name_or_path))
    settings: dict[str, Any] = {
        "max_seq_length": max_seq_length,
        "pooling": pooling,
        "normalize": normalize,
        "first_hidden_state": first_hidden_state,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    calibration = checkpoint.calibration if chosen.keys() <= {"max_seq_length"} else None  # of other vectors
    encoding = replace(checkpoint.encoding, **chosen)
    encoder = SentenceEncoder(replace(checkpoint, encoding=encoding, calibration=calibration), backend)
    return encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)


class SentenceEncoder:
    """A model, its tokenizer and its settings: `encode` turns texts into vectors.

    Safe to use from many threads at once, and in forked processes.

    Args:
        checkpoint: weights, tokenizer and settings, as `minilm.weights.load.read_checkpoint` returns them.
        backend: who computes the operations.

    Attributes:
        model: the `MiniLM`.
        tokenizer: the `Tokenizer`.
        encoding: pooling, normalisation, length limit and prompts; an `EncodingConfig`.
        provenance: where the weights came from.
    """

    def __init__(self, checkpoint: Checkpoint, backend: str | type[TorchBackend] = "auto") -> None:
        with torch.device("meta"):  # no memory and no random numbers: every tensor comes from the checkpoint
            self.model = MiniLM(checkpoint.config, backend)
        self.model.load_state_dict({k: v.float() for k, v in checkpoint.model_tensors.items()}, assign=True)
        self.model.requires_grad_(True).eval()
        self.tokenizer = Tokenizer(checkpoint.tokenizer_json)
        self.encoding = checkpoint.encoding
        self.provenance = checkpoint.provenance
        self.max_seq_length = checkpoint.encoding.max_seq_length  # checked against the position table
        self._checkpoint = checkpoint

    # Encoding.

    def encode(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        sentences: Texts | None = None,
        on_truncate: str = "warn",
        deterministic: bool = False,
        text_pairs: bool = False,
    ) -> Any:
        """Encode texts. Names, order and defaults are those of sentence-transformers' `encode`.

        Args:
            inputs: one string, or any iterable of strings.
            prompt_name: a prompt of the model's to put before each text; ignored if `prompt` is given.
            prompt: a text to put before each text.
            batch_size: with the length limit, the token budget of a batch: `batch_size * max_seq_length` tokens.
            show_progress_bar: by default, if the `minilm` logger is at level INFO or below.
            output_value: `sentence_embedding`, or `token_embeddings` for each text's last hidden states `[L, C]`.
            precision: `float32`, or `int8`, `uint8`, `binary`, `ubinary`: see `minilm.quantization.quantize`.
            convert_to_numpy: return a numpy array; if false, a list of tensors.
            convert_to_tensor: return one tensor instead, on the model's device.
            device: move the model there first, for good.
            normalize_embeddings: scale vectors to length 1; if false, the model's own setting holds.
            truncate_dim: keep this many dimensions (`normalize_embeddings` then scales what is kept).
            sentences: another name of `inputs`.
            on_truncate: what becomes of a text over the length limit. `warn`: cut it, and give one warning a call;
                `ignore`: cut it; `error`: raise; `chunk`: encode overlapping windows, average them by length.
            deterministic: compute each text alone, single-threaded, in several threads: its vector is then the same to
                the bit whatever the batch size, the order, its neighbours and the thread count. Slower.
            text_pairs: take two strings in a list or tuple as one text of two segments.

        Returns:
            `[n, C]` float32 in the order given; `[C]` for a single string. With `token_embeddings`, a list of tensors.

        Raises:
            TypeError: an input that is not a string, named by its position.
            ValueError: an option out of range; invalid Unicode; a text too long with `on_truncate="error"`.
        """
        if (inputs is None) == (sentences is None):
            raise TypeError("encode takes texts either as inputs (the first argument) or as sentences, and needs one")
        texts, single = as_texts(sentences if inputs is None else inputs, text_pairs=text_pairs)
        if output_value not in ("sentence_embedding", "token_embeddings"):
            raise ValueError(f"output_value must be sentence_embedding or token_embeddings, got {output_value!r}")
        embedder = self._embedder(
            prompt=prompt,
            prompt_name=prompt_name,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            precision=precision,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            on_truncate=on_truncate,
            deterministic=deterministic,
        )
        if device is not None:
            self.to(device)
        if output_value == "token_embeddings":
            rows: Any = threads.run(lambda: embedder.token_vectors(texts))
        else:
            rows = self._quantized(threads.run(lambda: embedder.vectors(texts)), embedder.options)
            if not convert_to_tensor:
                rows = rows.cpu().numpy() if convert_to_numpy else list(rows)
        embedder.report_truncation()
        return rows[0] if single else rows

    def encode_query(self, inputs: Texts | None = None, **options: Any) -> Any:
        """`encode` with the model's prompt named `query`, if it has one."""
        return self.encode(inputs, **self._with_prompt_name(options, "query"))

    def encode_document(self, inputs: Texts | None = None, **options: Any) -> Any:
        """`encode` with the model's prompt named `document`, `passage` or `corpus`, if it has one."""
        return self.encode(inputs, **self._with_prompt_name(options, "document", "passage", "corpus"))

    def encode_stream(
        self, inputs: Iterable[str], *, block_size: int = 4_096, **options: Any
    ) -> Iterator[NDArray[Any]]:
        """Encode texts as they come: one vector `[C]` for each, in order, in bounded memory.

        Args:
            inputs: any iterable, however long.
            block_size: texts read ahead and encoded together.
            options: of `encode`: prompt, prompt_name, batch_size, show_progress_bar, precision, normalize_embeddings,
                truncate_dim, on_truncate (a warning comes once, at the end) and deterministic.
        """
        embedder = self._embedder(**options)
        iterator, done = iter(inputs), 0
        while block := list(islice(iterator, block_size)):
            texts = [check_text(text, f"text {done + i}") for i, text in enumerate(block)]
            vectors = threads.run(partial(embedder.vectors, texts, done))
            yield from self._quantized(vectors, embedder.options).cpu().numpy()
            done += len(block)
        embedder.report_truncation()

    # Comparing.

    def similarity(self, a: Vectors, b: Vectors, metric: str | None = None) -> Tensor:
        """Score all rows of a against all rows of b; see `minilm.similarities`. The model's own metric by default."""
        return threads.run(lambda: similarity(a, b, metric or self.encoding.similarity))

    def similarity_pairwise(self, a: Vectors, b: Vectors, metric: str | None = None) -> Tensor:
        """Score each row of a against the same row of b; see `minilm.similarities`."""
        return threads.run(lambda: similarity_pairwise(a, b, metric or self.encoding.similarity))

    def search(
        self,
        queries: Any,
        corpus: Any,
        top_k: int = 10,
        metric: str | None = None,
        **options: Any,
    ) -> list[list[SearchHit]]:
        """Find the `top_k` best of the corpus for each query; each may be texts (encoded first) or vectors.

        `options` are `encode`'s; for results and errors see `minilm.similarities.search`.
        """
        if not _are_vectors(queries):
            queries = self.encode_query([queries] if isinstance(queries, str) else queries, **options)
        if not _are_vectors(corpus):
            corpus = self.encode_document([corpus] if isinstance(corpus, str) else corpus, **options)
        return threads.run(lambda: search(queries, corpus, top_k, metric or self.encoding.similarity))

    # Tokens.

    def token_counts(self, texts: Iterable[str]) -> list[int]:
        """Count each text's tokens, special tokens included, before any cut."""
        return [len(self.tokenizer(text)) for text in as_texts(texts)[0]]

    def tokenize(self, texts: Iterable[str], on_truncate: str = "warn") -> dict[str, Tensor]:
        """Return `input_ids`, `token_type_ids` and `attention_mask`, int64 `[B, S]`, padded, cut at the limit."""
        embedder = self._embedder(on_truncate=on_truncate)
        pieces = [embedder.fit(text, index)[0] for index, text in enumerate(as_texts(texts)[0])]
        embedder.report_truncation()
        batch = PackedBatch.from_sequences([p.ids for p in pieces], [p.type_ids for p in pieces])
        input_ids, mask = batch.pad(batch.ids, self.config.pad_token_id)
        return {"input_ids": input_ids, "token_type_ids": batch.pad(batch.type_ids)[0], "attention_mask": mask.long()}

    # What it is, and where.

    @property
    def config(self) -> MiniLMConfig:
        """The model's sizes."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embeddings.word.weight.device

    @property
    def prompts(self) -> dict[str, str]:
        """The model's named prompts."""
        return dict(self.encoding.prompts)

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a text, special tokens included; settable, up to the size of the position table."""
        return self.encoding.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, limit: int) -> None:
        encoding = replace(self.encoding, max_seq_length=limit)
        if limit > self.config.max_positions:
            raise ValueError(f"max_seq_length must be at most {self.config.max_positions} for this model, got {limit}")
        self.encoding = encoding

    def get_embedding_dimension(self) -> int:
        """C, the width of a vector."""
        return self.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> SentenceEncoder:
        """Move the model to a device, and to a dtype to compute in; returns the encoder.

        Raises:
            TypeError: several devices. ValueError: an unknown dtype.
        """
        if not isinstance(device, str | torch.device):
            raise TypeError(f"expected one device, such as 'cpu' or 'cuda:0', got {device!r}")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError("dtype must be a floating point type, such as 'float32', 'float16' or 'bfloat16'")
        self.model.to(device, dtype)
        return self

    # Keeping.

    @cached_property
    def calibration(self) -> Tensor:
        """The range of int8 and uint8 vectors: a lower and an upper bound of each dimension, float32 `[2, C]`.

        The mean, less and plus five standard deviations, over this package's calibration sentences. Kept with the
        weights by `minilm weights convert`, else computed on first use.
        """
        stored = self._checkpoint.calibration
        return stored if stored is not None else self._calibrate()

    def to_checkpoint(self) -> Checkpoint:
        """Return weights, tokenizer and settings as they are now, to save, export or fingerprint."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        return replace(
            self._checkpoint,
            tensors={**self._checkpoint.tensors, **tensors},
            encoding=self.encoding,
        )

    def fingerprint(self) -> str:
        """Return a sha256 over tensors, tokenizer and pooling settings: equal fingerprints give equal vectors."""
        return fingerprint(self.to_checkpoint())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `minilm.load` reads."""
        self.to_checkpoint().save(Path(folder))

    # Inner steps.

    def _embedder(self, prompt: str | None = None, prompt_name: str | None = None, **options: Any) -> Embedder:
        """Check a call's options and put them together with the model."""
        if self.model.training:
            self.model.eval()
        chosen = EncodeOptions(prompt=self._prompt(prompt, prompt_name), **options)
        if chosen.truncate_dim is not None and chosen.truncate_dim > self.config.hidden_size:
            raise ValueError(f"truncate_dim must be at most {self.config.hidden_size}, got {chosen.truncate_dim}")
        return Embedder(self.model, self.tokenizer, self.encoding, chosen)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """Return the text to put before each text."""
        if prompt is not None:
            return check_text(prompt, "prompt")
        name = prompt_name if prompt_name is not None else self.encoding.default_prompt_name
        if name is None:
            return ""
        if name not in self.encoding.prompts:
            known = ", ".join(sorted(self.encoding.prompts)) or "none"
            raise ValueError(f"this model has no prompt named {name!r}; it has: {known}")
        return self.encoding.prompts[name]

    def _with_prompt_name(self, options: dict[str, Any], *names: str) -> dict[str, Any]:
        """Choose the first prompt of these names that the model has, unless the caller chose one."""
        known = [name for name in names if name in self.encoding.prompts]
        if known and options.get("prompt") is None and options.get("prompt_name") is None:
            return {**options, "prompt_name": known[0]}
        return options

    def _quantized(self, vectors: Tensor, options: EncodeOptions) -> Tensor:
        """Bring vectors to the precision asked for."""
        if options.precision == "float32":
            return vectors
        ranges = None
        if options.precision in ("int8", "uint8"):
            rescaled = options.normalize_embeddings and (options.truncate_dim or not self.encoding.normalize)
            ranges = self._calibrate(options) if rescaled else self.calibration
        quantized = quantize(vectors.cpu().numpy(), options.precision, None if ranges is None else ranges.numpy())
        return torch.from_numpy(quantized).to(vectors.device)

    def _calibrate(self, options: EncodeOptions | None = None) -> Tensor:
        """Encode the calibration sentences, and return the bounds of each dimension: `[2, C]`."""
        sentences = (files("minilm") / "calibration.txt").read_text(encoding="utf-8").splitlines()
        chosen = replace(options or EncodeOptions(), show_progress_bar=False, on_truncate="ignore", deterministic=True)
        embedder = Embedder(self.model, self.tokenizer, self.encoding, chosen)
        vectors = threads.run(lambda: embedder.vectors(sentences)).cpu().numpy()
        mean, spread = vectors.mean(axis=0), 5 * vectors.std(axis=0)
        return torch.from_numpy(np.stack([mean - spread, mean + spread]))


def _are_vectors(inputs: Any) -> bool:
    """Tell vectors (tensors, numeric arrays, lists of them) from texts."""
    if isinstance(inputs, list | tuple) and inputs:
        inputs = inputs[0]
        if isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], int | float):
            return True
    return isinstance(inputs, Tensor | float) or getattr(getattr(inputs, "dtype", None), "kind", "O") in "fiu"
