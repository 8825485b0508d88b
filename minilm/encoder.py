"""`SentenceEncoder`: text in, vectors out. What most people import, through `minilm.load`."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm import threads
from minilm.activations import set_input_ranges
from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.embed import Embedder, EncodeOptions
from minilm.kernels.backend import BackendChoice
from minilm.model import MiniLM, floating_dtype
from minilm.progress import progress_bar
from minilm.quantization import calibration_ranges, calibration_sentences, normalized_ranges, quantize
from minilm.similarities import SearchHit, Vectors, are_vectors, search, similarity, similarity_pairwise
from minilm.texts import Texts, as_texts, check_text, iter_texts
from minilm.tokenizer import Tokenizer
from minilm.weights.checkpoint import Checkpoint, fingerprint
from minilm.weights.sources import read_model


@threads.fork_safe
def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    first_hidden_state: str | None = None,
    backend: BackendChoice = "auto",
) -> SentenceEncoder:
    """Load a model, fetching its weights first if need be.

    Args:
        name_or_path: a folder, or a name: one that comes with minilm, or on a hub; all-MiniLM-L6-v2 by default.
        device: `cuda` where there is one, else `cpu`, by default.
        dtype: what the model computes in, by default float16 on a GPU and float32 elsewhere; vectors are float32.
        max_seq_length: tokens kept of a text, special tokens included; the folder's own setting (128) by default.
        pooling: see `EncodingConfig`; the folder's own setting by default.
        normalize: whether vectors get length 1; the folder's own setting by default.
        first_hidden_state: see `EncodingConfig`; the folder's own setting by default.
        backend: who computes the operations; see `minilm.kernels.backend.make_backend`. By default the fastest that is
            exact; on a CPU, for a folder of 8-bit weights, `int8`: its products are in 8 bits whatever the dtype.

    Raises:
        BackendError: the backend asked for can't be found, or can't run there.
        SourceError: the weights are nowhere to be had; every place tried is named.
        WeightsError: they are there, and unusable.
        ValueError: a setting out of range.
    """
    checkpoint = read_model(name_or_path)
    settings: dict[str, Any] = {
        "max_seq_length": max_seq_length,
        "pooling": pooling,
        "normalize": normalize,
        "first_hidden_state": first_hidden_state,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "auto" and checkpoint.int8 is not None and str(device) == "cpu":
        backend = "int8"
    encoder = SentenceEncoder(checkpoint.with_encoding(**chosen), backend)
    return encoder.to(device, dtype or ("float16" if str(device).startswith("cuda") else "float32"))


_STREAM_OPTIONS = {field.name for field in fields(EncodeOptions)} | {"prompt_name"}


class SentenceEncoder:
    """A model, its tokenizer and its settings: `encode` turns texts into vectors.

    Safe to use from many threads at once, and in forked processes.

    Args:
        checkpoint: weights, tokenizer and settings, as `minilm.weights.sources.read_model` returns them.
        backend: who computes the operations.

    Attributes:
        model: the `MiniLM`.
        tokenizer: the `Tokenizer`.
        encoding: pooling, normalisation, length limit and prompts; an `EncodingConfig`.
        checkpoint: what it was made from, with the weights' provenance and golden results. The model takes over its
            tensors: training changes them.
    """

    def __init__(self, checkpoint: Checkpoint, backend: BackendChoice = "auto") -> None:
        with torch.device("meta"):  # no memory and no random numbers: every tensor comes from the checkpoint
            self.model = MiniLM(checkpoint.config, backend, checkpoint.output_width)
        self.model.load_state_dict({k: v.float() for k, v in checkpoint.model_tensors.items()}, assign=True)
        self.model.requires_grad_(True).eval()
        set_input_ranges(self.model, checkpoint.input_ranges)
        self.tokenizer = Tokenizer(checkpoint.tokenizer_json)
        self.checkpoint = checkpoint
        self.encoding = checkpoint.encoding
        self.max_seq_length = checkpoint.encoding.max_seq_length  # checked against the position table

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
            if precision != "float32" or normalize_embeddings or truncate_dim is not None:
                raise ValueError("token embeddings come as they are: float32, whole and not normalised")
            rows: Any = threads.run(lambda: embedder.token_vectors(texts))
        else:
            rows = self._quantized(threads.run(lambda: embedder.vectors(texts)), embedder.options)
            if not convert_to_tensor:
                rows = rows.cpu().numpy() if convert_to_numpy else list(rows)
        embedder.report_truncation()
        return rows[0] if single else rows

    def encode_query(
        self, inputs: Texts | None = None, prompt_name: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        """`encode`, with the same arguments, and the model's prompt named `query` if it has one."""
        return self.encode(inputs, prompt_name or self.encoding.known_prompt("query"), *rest, **options)

    def encode_document(
        self, inputs: Texts | None = None, prompt_name: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        """`encode`, with the same arguments, and the model's prompt named `document`, `passage` or `corpus` if any."""
        prompt_name = prompt_name or self.encoding.known_prompt("document", "passage", "corpus")
        return self.encode(inputs, prompt_name, *rest, **options)

    def encode_stream(
        self, inputs: Iterable[str], *, block_size: int = 4_096, **options: Any
    ) -> Iterator[NDArray[Any]]:
        """Encode texts as they come: one vector `[C]` for each, in order, in bounded memory.

        Args:
            inputs: any iterable, however long.
            block_size: texts read ahead and encoded together.
            options: of `encode`: prompt, prompt_name, batch_size, show_progress_bar, precision, normalize_embeddings,
                truncate_dim, on_truncate (a warning comes once, at the end) and deterministic.

        Raises:
            TypeError: at once, not an iterable of strings; in its turn, an element that is not a string.
            ValueError: an option out of range; invalid Unicode; a text too long with `on_truncate="error"`.
        """
        if isinstance(inputs, str):
            raise TypeError("expected an iterable of strings, got one string; encode is for a single text")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if unknown := options.keys() - _STREAM_OPTIONS:
            raise TypeError(f"encode_stream has no option {', '.join(sorted(unknown))}")
        show_progress_bar = options.pop("show_progress_bar", None)
        embedder, iterator = self._embedder(**options, show_progress_bar=False), iter_texts(inputs)

        def vectors() -> Iterator[NDArray[Any]]:
            done = 0
            with progress_bar(show_progress_bar, None, "encode", "text") as advance:
                while texts := list(islice(iterator, block_size)):
                    rows = threads.run(partial(embedder.vectors, texts, done))
                    yield from self._quantized(rows, embedder.options).cpu().numpy()
                    done += len(texts)
                    advance(len(texts))
            embedder.report_truncation()

        return vectors()

    # Comparing.

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors, metric: str | None = None) -> Tensor:
        """Score all rows of one against all of the other: `[n, m]`; the model's metric by default."""
        return similarity(embeddings1, embeddings2, metric or self.encoding.similarity)

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors, metric: str | None = None) -> Tensor:
        """Score each row of one against the same row of the other: `[n]`; the model's metric by default."""
        return similarity_pairwise(embeddings1, embeddings2, metric or self.encoding.similarity)

    def search(
        self, queries: Any, corpus: Any, top_k: int = 10, metric: str | None = None, **options: Any
    ) -> list[list[SearchHit]]:
        """Find the `top_k` best of the corpus for each query; each may be texts (encoded first) or vectors.

        `options` are `encode`'s; for results and errors see `minilm.similarities.search`.
        """
        if not are_vectors(queries):
            queries = self.encode_query([queries] if isinstance(queries, str) else queries, **options)
        if not are_vectors(corpus):
            corpus = self.encode_document([corpus] if isinstance(corpus, str) else corpus, **options)
        return search(queries, corpus, top_k, metric or self.encoding.similarity)

    # Tokens.

    def token_counts(self, texts: Iterable[str]) -> list[int]:
        """Count each text's tokens, special tokens included, before any cut."""
        return [len(self.tokenizer(text)) for text in as_texts(texts)[0]]

    def tokenize(self, texts: Iterable[str], on_truncate: str = "warn") -> dict[str, Tensor]:
        """Return `input_ids`, `token_type_ids` and `attention_mask`, int64 `[B, S]`, padded, cut at the limit."""
        embedder = self._embedder(on_truncate=on_truncate)
        pieces = [embedder.fit(text, index)[0] for index, text in enumerate(as_texts(texts)[0])]
        embedder.report_truncation()
        if not pieces:
            empty = torch.zeros(0, 0, dtype=torch.int64)
            return {"input_ids": empty, "token_type_ids": empty, "attention_mask": empty}
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
        encoding = replace(self.encoding, max_seq_length=operator.index(limit))
        if limit > self.config.max_positions:
            raise ValueError(f"max_seq_length must be at most {self.config.max_positions} for this model, got {limit}")
        self.encoding = encoding

    def get_embedding_dimension(self) -> int:
        """The width of a vector: C, or what the model's output layer makes of it."""
        return self.model.vector_size

    get_sentence_embedding_dimension = get_embedding_dimension

    @threads.fork_safe
    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> SentenceEncoder:
        """Move the model to a device, and to a dtype to compute in; returns the encoder.

        Raises:
            TypeError: several devices.
            ValueError: a device that is not there, a backend that can't run on it (`BackendError`), or a dtype that is
                no floating point type.
        """
        if not isinstance(device, str | torch.device):
            raise TypeError(f"expected one device, such as 'cpu' or 'cuda:0', got {device!r}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"device {str(device)!r} can't be used here; 'cpu' always can. Torch says: {reason}"
            ) from None
        chosen = None if dtype is None else floating_dtype(dtype)
        self.model.backend_on(torch.device(device).type)  # raises where it can't run, before anything has moved
        self.model.to(device, chosen)
        return self

    # Keeping.

    @cached_property
    def calibration(self) -> Tensor:
        """The range of int8 and uint8 vectors: a lower and an upper bound of each dimension, float32 `[2, C]`.

        The mean, less and plus five standard deviations, over this package's calibration sentences. Kept with the
        weights by `minilm weights convert`, else computed on first use.
        """
        if self.checkpoint.calibration is not None:
            return self.checkpoint.calibration
        embedder = self._embedder(prompt="", show_progress_bar=False, on_truncate="ignore", deterministic=True)
        vectors = threads.run(lambda: embedder.vectors(calibration_sentences()))
        return torch.from_numpy(calibration_ranges(vectors.cpu().numpy()))

    @threads.fork_safe
    def to_checkpoint(self) -> Checkpoint:
        """Return weights (in float32), tokenizer and settings as they are now, to save, export or fingerprint.

        Golden results, calibration and model card are left out if they belong to another state than this.
        """
        now = self._current()
        if fingerprint(now) == self.checkpoint.stored_fingerprint:
            return now
        return now.with_weights(now.tensors)

    @threads.fork_safe
    def fingerprint(self) -> str:
        """Return a sha256 over tensors, tokenizer and pooling settings: equal fingerprints give equal vectors."""
        return fingerprint(self._current())

    @threads.fork_safe
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder that `minilm.load` reads, and return it."""
        return self.to_checkpoint().save(folder)

    # Inner steps.

    def _current(self) -> Checkpoint:
        """Return the checkpoint with the weights and settings of now; its results may be those of another state."""
        tensors = {name: tensor.detach().float().cpu() for name, tensor in self.model.state_dict().items()}
        return replace(self.checkpoint, tensors={**self.checkpoint.optional_tensors, **tensors}, encoding=self.encoding)

    def _embedder(self, prompt: str | None = None, prompt_name: str | None = None, **options: Any) -> Embedder:
        """Check a call's options and put them together with the model."""
        prompt = check_text(self.encoding.prompt(prompt, prompt_name), "prompt")
        chosen = EncodeOptions(prompt, **options)
        if chosen.truncate_dim is not None and chosen.truncate_dim > self.model.vector_size:
            raise ValueError(f"truncate_dim must be at most {self.model.vector_size}, got {chosen.truncate_dim}")
        return Embedder(self.model, self.tokenizer, self.encoding, chosen)

    def _quantized(self, vectors: Tensor, options: EncodeOptions) -> Tensor:
        """Bring vectors to the precision asked for."""
        if options.precision == "float32":
            return vectors
        ranges = None
        if options.precision in ("int8", "uint8"):
            ranges = self.calibration.numpy()
            if options.normalize_embeddings and (options.truncate_dim or not self.encoding.normalize):
                ranges = normalized_ranges(ranges, vectors.shape[1])
        return torch.from_numpy(quantize(vectors.cpu().numpy(), options.precision, ranges)).to(vectors.device)
