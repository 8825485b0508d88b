"""Other people's engines, one class each: what a measurement of ours is worth is seen beside them.

To add one: subclass `Engine`, and name it in `PEERS`. It reads the weights from `self.plan["folder"]`, which has the
layout of sentence-transformers, and computes on `self.choice.device` in `self.torch_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from minilm.bench.engines import Choice, Engine, EngineError, WeightsOnDisk
from minilm.bench.onnx_peers import (
    FastEmbed,
    OnnxPeer,
    OnnxRuntime,
    OnnxRuntimeInt8,
    OnnxRuntimeInt8Unfused,
    OnnxRuntimeUnfused,
    OpenVino,
    OpenVinoInt8,
)
from minilm.bench.workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

PADDED_TOKENS = 32 * 1_024  # a batch of sequences sorted by length: enough to fill a GPU


class SentenceTransformers(WeightsOnDisk):
    """sentence-transformers, from text to vectors."""

    packages: tuple[str, ...] = ("sentence-transformers", "transformers", "torch", "tokenizers")

    def imports(self) -> None:
        """See `Engine`."""
        import sentence_transformers  # noqa: F401

    def load(self) -> None:
        """See `Engine`."""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(self.plan["folder"], device=self.choice.device)
        self.model = model.to(self.torch_dtype).eval()

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:  # noqa: ARG002
        """See `Engine`."""
        texts, options = list(workload.texts), {"batch_size": self.batch_size, "show_progress_bar": False}

        def encode() -> Any:
            self.model.max_seq_length = workload.limit
            return self.model.encode(texts, **options)

        return encode


class Transformers(WeightsOnDisk):
    """transformers' BERT with torch's fused attention, padded, pooled as its model cards show."""

    kinds: tuple[str, ...] = ("texts", "tokens")
    packages: tuple[str, ...] = ("transformers", "torch", "tokenizers")

    def imports(self) -> None:
        """See `Engine`."""
        import transformers  # noqa: F401

    def load(self) -> None:
        """See `Engine`."""
        from transformers import AutoTokenizer, BertModel

        self.pooling = self.plan["encoding"]["pooling"]
        if self.pooling not in ("mean", "cls"):
            raise EngineError(f"this peer pools by mean or cls; the model's pooling is {self.pooling}")
        self.normalize = self.plan["encoding"]["normalize"]
        folder = self.plan["folder"]
        model: Any = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
        self.model = model.to(self.choice.device, self.torch_dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:
        """See `Engine`."""
        import torch

        if workload.kind == "texts":
            return self._encoding(list(workload.texts), workload.limit)
        batches = [self._padded(batch) for batch in self.batches(self.sequences(workload, rotation))]
        indices = torch.cat([indices for indices, *_ in batches])
        order = None if bool((indices.diff() == 1).all()) else indices.argsort()

        def compute() -> Tensor:
            with torch.inference_mode():
                rows = [self.vectors(ids, mask) for _, ids, mask in batches]
                joined = rows[0] if len(rows) == 1 else torch.cat(rows)
                return joined if order is None else joined[order]

        return compute

    def batches(self, sequences: list[list[int]]) -> list[list[tuple[int, list[int]]]]:
        """Return the sequences, numbered, in batches: here one, as they come."""
        return [list(enumerate(sequences))]

    def vectors(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vectors of a padded batch: ids and mask `[B, S]` (None: no padding) -> `[B, C]`."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weights = mask.unsqueeze(2).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled.float(), dim=1) if self.normalize else pooled.float()

    def _padded(self, batch: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a batch's numbers, its ids `[B, S]`, and its mask if there is padding."""
        import torch

        width, device = max(len(ids) for _, ids in batch), self.choice.device
        padding = self.plan["config"]["pad_token_id"]
        ids = torch.tensor([ids + [padding] * (width - len(ids)) for _, ids in batch], device=device)
        lengths = torch.tensor([len(ids) for _, ids in batch], device=device)
        mask = (torch.arange(width, device=device) < lengths.unsqueeze(1)).long()
        indices = torch.tensor([index for index, _ in batch], device=device)
        return indices, ids, None if bool(mask.all()) else mask

    def _encoding(self, texts: list[str], limit: int) -> Callable[[], Any]:
        """Return what encodes texts, some at a time."""
        import torch

        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}

        def encode() -> Any:
            rows = []
            with torch.inference_mode():
                for start in range(0, len(texts), self.batch_size):
                    inputs = self.tokenizer(texts[start : start + self.batch_size], **options).to(self.choice.device)
                    rows.append(self.vectors(inputs["input_ids"], inputs["attention_mask"]))
            return torch.cat(rows).cpu().numpy()

        return encode


class TransformersSorted(Transformers):
    """The same on sequences sorted by length, in several batches: less padding, more launches."""

    kinds: tuple[str, ...] = ("tokens",)

    def batches(self, sequences: list[list[int]]) -> list[list[tuple[int, list[int]]]]:
        """Return the sequences, numbered, longest first, in batches of at most `PADDED_TOKENS` with their padding."""
        made: list[list[tuple[int, list[int]]]] = []
        for index, ids in sorted(enumerate(sequences), key=lambda item: -len(item[1])):
            if not made or (len(made[-1]) + 1) * len(made[-1][0][1]) > PADDED_TOKENS:
                made.append([])
            made[-1].append((index, ids))
        return made

    def takes(self, workload: Workload) -> bool:
        """Sorting changes nothing where all are equally long."""
        return super().takes(workload) and len(set(workload.lengths)) > 1


class TransformersCompiled(Transformers):
    """The same as `Transformers`, pooling included, compiled by torch: for each shape on a GPU, for any on a CPU."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.compiles_each_shape = choice.device.startswith("cuda")
        self.kinds = ("tokens",) if self.compiles_each_shape else ("texts", "tokens")

    def load(self) -> None:
        """See `Engine`."""
        import torch
        import torch._dynamo.config as dynamo

        super().load()
        eager: Any = super().vectors
        if self.compiles_each_shape:
            for name in ("recompile_limit", "cache_size_limit"):  # the second was its name before torch 2.7
                if hasattr(dynamo, name):
                    setattr(dynamo, name, 64)
            self._compiled: Any = torch.compile(eager, mode="max-autotune", dynamic=False)
        else:
            self._compiled = torch.compile(eager, dynamic=True)

    def vectors(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """See `Transformers`."""
        import torch

        torch.compiler.cudagraph_mark_step_begin()
        rows: Tensor = self._compiled(ids, mask)
        return rows


class PaddedAttention(Engine):
    """torch's `scaled_dot_product_attention` on padded queries, keys and values."""

    kinds: tuple[str, ...] = ("attention",)
    packages: tuple[str, ...] = ("torch",)

    def imports(self) -> None:
        """See `Engine`."""
        import torch  # noqa: F401

    def load(self) -> None:
        """Nothing to load."""

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:
        """See `Engine`."""
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        batch = self.packed(workload, rotation)
        padded = [batch.pad(x) for x in self.heads(workload)]
        query, key, value = (x.transpose(1, 2).contiguous() for x, _ in padded)  # [B, H, S, D]
        kept = padded[0][1]
        mask = None if bool(kept.all()) else kept[:, None, None, :]

        def compute() -> Tensor:
            with torch.inference_mode():
                return F.scaled_dot_product_attention(query, key, value, mask)

        return _Unpadded(compute, kept)


class _Unpadded:
    """A call whose first result has its padding taken out, to be compared; from then on only the call is timed."""

    def __init__(self, call: Callable[[], Tensor], kept: Tensor) -> None:
        self._call = call
        self._kept: Tensor | None = kept

    def __call__(self) -> Tensor:
        result, kept, self._kept = self._call(), self._kept, None
        return result if kept is None else result.transpose(1, 2)[kept]


class VarlenAttention(PaddedAttention):
    """torch's own attention over packed sequences (torch 2.10 and later)."""

    devices: tuple[str, ...] = ("cuda",)

    def load(self) -> None:
        """See `Engine`."""
        from torch.nn.attention.varlen import varlen_attn

        self.attention: Callable[..., Any] = varlen_attn

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:
        """See `Engine`."""
        import torch

        query, key, value = self.heads(workload)
        batch = self.packed(workload, rotation)
        ends, longest = batch.cu_seqlens, batch.max_seqlen

        def compute() -> Any:
            with torch.inference_mode():
                return self.attention(query, key, value, ends, ends, longest, longest)

        return compute


class FlashAttention(VarlenAttention):
    """The flash-attn package's attention over packed sequences."""

    packages: tuple[str, ...] = ("flash-attn", "torch")

    def load(self) -> None:
        """See `Engine`."""
        self.attention = import_module("flash_attn").flash_attn_varlen_func


PEERS: dict[str, type[Engine]] = {
    "sentence-transformers": SentenceTransformers,
    "onnxruntime": OnnxRuntime,
    "onnxruntime-unfused": OnnxRuntimeUnfused,
    "onnxruntime-int8": OnnxRuntimeInt8,
    "onnxruntime-int8-unfused": OnnxRuntimeInt8Unfused,
    "openvino": OpenVino,
    "openvino-int8": OpenVinoInt8,
    "fastembed": FastEmbed,
    "transformers": Transformers,
    "transformers-sorted": TransformersSorted,
    "transformers-compiled": TransformersCompiled,
    "padded-attention": PaddedAttention,
    "varlen-attention": VarlenAttention,
    "flash-attention": FlashAttention,
}
DEFAULT_PEERS = {
    "cpu": ("sentence-transformers", *(name for name, peer in PEERS.items() if issubclass(peer, OnnxPeer))),
    "cuda": tuple(name for name, peer in PEERS.items() if "cuda" in peer.devices),
}
