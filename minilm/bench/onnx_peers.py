"""Peers that compute from a file of the model's graph (see `onnx_files`) on a CPU: onnxruntime, openvino, fastembed.

The first two are given what sentence-transformers does around them: texts sorted by length, in batches, each padded to
its longest, by the same fast tokenizer; pooling is part of the graph, so that a text is one call of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.bench.engines import EngineError, WeightsOnDisk
from minilm.bench.workloads import Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

OUTPUT = "sentence_embedding"
EXPORT_ERRORS = "export_errors.json"  # beside the files: why one is missing
INT8_COSINE = 0.95  # what a peer in int8 is to keep, so that it is known to do the same work


class OnnxPeer(WeightsOnDisk):
    """Texts in batches of like length through a graph.

    Attributes:
        file: the one it reads, of `onnx_files.MAKERS`.
    """

    devices: tuple[str, ...] = ("cpu",)
    file = "fused.onnx"

    @property
    def path(self) -> str:
        """Where the file is.

        Raises:
            EngineError: it could not be made.
        """
        path = Path(self.plan["folder"]) / self.file
        if not path.exists():
            errors = json.loads((path.parent / EXPORT_ERRORS).read_text(encoding="utf-8"))
            raise EngineError(f"{self.file} could not be made: {errors.get(self.file) or errors}")
        return str(path)

    def load(self) -> None:
        """See `Engine`."""
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_file(str(Path(self.plan["folder"]) / "tokenizer.json"))
        self.tokenizer.enable_padding(pad_id=self.plan["config"]["pad_token_id"])
        self.run = self.session()

    def session(self) -> Callable[[dict[str, NDArray[Any]]], NDArray[Any]]:
        """Load the graph; return what computes a batch's vectors `[B, C]` of the graph's inputs `[B, S]`."""
        raise NotImplementedError

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:  # noqa: ARG002
        """See `Engine`."""
        import numpy as np

        texts = list(workload.texts)

        def encode() -> Any:
            self.tokenizer.enable_truncation(workload.limit)
            order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
            rows = []
            for start in range(0, len(order), self.batch_size):
                batch = [texts[index] for index in order[start : start + self.batch_size]]
                encodings = self.tokenizer.encode_batch_fast(batch)
                ids = np.array([encoding.ids for encoding in encodings])
                mask = np.array([encoding.attention_mask for encoding in encodings])
                rows.append(self.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}))
            vectors = np.empty((len(order), rows[0].shape[1]), np.float32)
            vectors[order] = np.concatenate(rows)
            return vectors

        return encode


class OnnxRuntime(OnnxPeer):
    """onnxruntime on the graph that its own tool fused."""

    packages: tuple[str, ...] = ("onnxruntime", "onnx", "tokenizers")

    def imports(self) -> None:
        """See `Engine`."""
        import onnxruntime  # noqa: F401

    def session(self) -> Callable[[dict[str, NDArray[Any]]], NDArray[Any]]:
        """See `OnnxPeer`."""
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.num_threads, 1
        session = InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run([OUTPUT], inputs)[0]


class OnnxRuntimeUnfused(OnnxRuntime):
    """onnxruntime on the plain graph, of which it fuses what it will when it loads it."""

    file = "plain.onnx"


class OnnxRuntimeInt8(OnnxRuntime):
    """onnxruntime on the fused graph, quantised by its own tool, activations as they come ("dynamic")."""

    file = "int8.onnx"
    precision = "int8"
    min_cosine = INT8_COSINE


class OnnxRuntimeInt8Unfused(OnnxRuntimeInt8):
    """The same on the plain graph."""

    file = "int8_unfused.onnx"


class OpenVino(OnnxPeer):
    """openvino, which fuses by itself, in the precision asked for: by its own choice it takes the CPU's fastest."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    packages: tuple[str, ...] = ("openvino", "onnx", "tokenizers")
    file = "plain.onnx"

    def imports(self) -> None:
        """See `Engine`."""
        import openvino  # noqa: F401

    def session(self) -> Callable[[dict[str, NDArray[Any]]], NDArray[Any]]:
        """See `OnnxPeer`."""
        import openvino

        precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[self.choice.dtype]
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.num_threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        core = openvino.Core()
        if self.choice.dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError("openvino has no bfloat16 on this CPU")
        request = core.compile_model(self.path, "CPU", options).create_infer_request()
        return lambda inputs: request.infer(inputs, share_inputs=True)[OUTPUT]


class OpenVinoInt8(OpenVino):
    """openvino on the graph that its NNCF quantised, activations by scales found ahead; the rest in the dtype."""

    packages: tuple[str, ...] = ("nncf", *OpenVino.packages)
    file = "int8.xml"
    precision = "int8"
    min_cosine = INT8_COSINE


class FastEmbed(OnnxPeer):
    """fastembed, from text to vectors, with our model as its users add one; batches as the texts come."""

    packages: tuple[str, ...] = ("fastembed", "onnxruntime", "onnx", "tokenizers")

    def imports(self) -> None:
        """See `Engine`."""
        import fastembed  # noqa: F401

    def load(self) -> None:
        """See `Engine`."""
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        folder = Path(self.path).parent
        TextEmbedding.add_custom_model(
            "local",
            pooling=PoolingType.DISABLED,  # the graph does it
            normalization=False,
            sources=ModelSource(hf="local"),
            dim=self.plan["config"]["hidden_size"],
            model_file=self.file,
        )
        options = {"specific_model_path": str(folder), "cache_dir": str(folder), "threads": self.num_threads}
        self.model: Any = TextEmbedding("local", **options)

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:  # noqa: ARG002
        """See `Engine`."""
        texts = list(workload.texts)

        def encode() -> Any:
            self.model.model.tokenizer.enable_truncation(workload.limit)
            return list(self.model.embed(texts, batch_size=self.batch_size))

        return encode
