"""The model as files for the peers that compute from a graph: plain, fused, and quantised.

The plain graph (Devlin et al. 2019, pooling included) is written operator by operator, in the shape in which exporters
leave BERT, so that optimisers find what they fuse. Fusing and quantising are left to the peers' own tools. The inputs
are `input_ids`, `attention_mask` and `token_type_ids`, `[B, S]` int64 each; the output, `sentence_embedding`, `[B, C]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file

from minilm.bench.onnx_peers import OUTPUT
from minilm.bench.worker import describe

OPSET = 17  # the first with LayerNormalization
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PLAIN, FUSED = "plain.onnx", "fused.onnx"

Plan = dict[str, Any]


def export(names: Iterable[str], plan: Plan) -> dict[str, str]:
    """Write files into the plan's folder, and those that they are made of.

    Args:
        names: which, of `MAKERS`.
        plan: what `reference.build` wrote of the model.

    Returns:
        By name, why a file could not be made.
    """
    errors = {}
    for name in dict.fromkeys((PLAIN, *names)):
        try:
            MAKERS[name](Path(plan["folder"]), plan)
        except ImportError as error:
            errors[name] = f'{error}: pip install "minilm[peers]"'
        except Exception as error:  # of tools that are not ours
            errors[name] = describe(error)
    return errors


def _fused(folder: Path, plan: Plan) -> None:
    """Have onnxruntime fuse attention, embeddings, residual + LayerNorm and bias + GELU (by erf, no approximation)."""
    from onnxruntime.transformers.optimizer import optimize_model

    sizes = {"num_heads": plan["config"]["num_heads"], "hidden_size": plan["config"]["hidden_size"]}
    optimized = optimize_model(str(folder / PLAIN), model_type="bert", opt_level=0, **sizes)
    optimized.save_model_to_file(str(folder / FUSED))


def _int8(folder: Path, plan: Plan) -> None:
    """Have onnxruntime quantise the fused graph: weights with a scale a channel, activations as they come."""
    if not (folder / FUSED).exists():
        _fused(folder, plan)
    _quantize(folder / FUSED, folder / "int8.onnx")


def _int8_unfused(folder: Path, _: Plan) -> None:
    """The same with the plain graph."""
    _quantize(folder / PLAIN, folder / "int8_unfused.onnx")


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    known = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # or it would ask for the types of fused operators
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, extra_options=known)


def _int8_openvino(folder: Path, _: Plan) -> None:
    """Have openvino's NNCF quantise weights and activations, by what these are on the package's own sentences."""
    import nncf
    import openvino
    from tokenizers import Tokenizer

    from minilm.quantization import calibration_sentences

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def feed(text: str) -> dict[str, NDArray[np.int64]]:
        ids = np.array([tokenizer.encode(text).ids])
        return dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))

    model = openvino.Core().read_model(folder / PLAIN)
    sentences = nncf.Dataset(calibration_sentences(), feed)
    quantized = nncf.quantize(model, sentences, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "int8.xml", compress_to_fp16=False)


def _plain(folder: Path, plan: Plan) -> None:
    """Write the graph as it follows from the formulas."""
    tensor = onnx.helper.make_tensor_value_info
    graph = _Graph(load_file(folder / "model.safetensors"), plan["config"])
    hidden = graph.embeddings()
    for number in range(plan["config"]["num_layers"]):
        hidden = graph.layer(hidden, f"encoder.layer.{number}")
    graph.pool(hidden, plan["encoding"])
    inputs = [tensor(name, onnx.TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
    outputs = [tensor(OUTPUT, onnx.TensorProto.FLOAT, ["batch", plan["config"]["hidden_size"]])]
    made = onnx.helper.make_graph(graph.nodes, "bert", inputs, outputs, graph.constants)
    version = onnx.helper.make_opsetid("", OPSET)
    onnx.save(onnx.helper.make_model(made, opset_imports=[version], ir_version=8), folder / PLAIN)


MAKERS: dict[str, Callable[[Path, Plan], None]] = {
    PLAIN: _plain,
    FUSED: _fused,
    "int8.onnx": _int8,
    "int8_unfused.onnx": _int8_unfused,
    "int8.xml": _int8_openvino,
}


class _Graph:
    """The nodes and constants of a graph that grows.

    Args:
        tensors: the weights under BERT's names.
        config: the sizes, as `MiniLMConfig.to_dict` returns them.
    """

    def __init__(self, tensors: dict[str, NDArray[Any]], config: dict[str, Any]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._tensors = tensors
        self._config = config
        self._mask = ""  # what attention adds to its scores

    def embeddings(self) -> str:
        """LN(word + token type + position); also makes the mask: 0 at words, the least float32 at padding."""
        rows = self._constant(np.arange(self._config["max_positions"])[None])
        length = self._node("Gather", self._node("Shape", "input_ids"), self._constant(1), axis=0)
        length = self._node("Unsqueeze", length, self._constant([0]))
        positions = self._node("Slice", rows, self._constant([0]), length, self._constant([1]))
        word, token_type, position = (
            self._node("Gather", self._weight(f"embeddings.{name}_embeddings.weight"), ids)
            for name, ids in (("word", "input_ids"), ("token_type", "token_type_ids"), ("position", positions))
        )
        kept = self._node("Unsqueeze", "attention_mask", self._constant([1]))
        kept = self._float(self._node("Unsqueeze", kept, self._constant([2])))
        dropped = self._node("Sub", self._constant(1.0), kept)
        self._mask = self._node("Mul", dropped, self._constant(np.finfo(np.float32).min))
        return self._norm(self._node("Add", self._node("Add", word, token_type), position), "embeddings.LayerNorm")

    def layer(self, x: str, name: str) -> str:
        """LN(x + W_o·attention(x)), then LN(x + W_2·gelu(W_1·x)): `[B, S, C]` -> `[B, S, C]`."""
        update = self._linear(self._attention(x, f"{name}.attention.self"), f"{name}.attention.output.dense")
        x = self._norm(self._node("Add", update, x), f"{name}.attention.output.LayerNorm")
        inner = self._gelu(self._linear(x, f"{name}.intermediate.dense"))
        update = self._linear(inner, f"{name}.output.dense")
        return self._norm(self._node("Add", update, x), f"{name}.output.LayerNorm")

    def pool(self, x: str, encoding: dict[str, Any]) -> None:
        """Sentence vectors, the graph's output: `[B, S, C]` -> `[B, C]`."""
        if encoding["pooling"] == "cls":
            vectors = self._node("Gather", x, self._constant(0), axis=1)
        elif encoding["pooling"] == "mean":
            kept = self._float(self._node("Unsqueeze", "attention_mask", self._constant([2])))
            total = self._node("ReduceSum", self._node("Mul", x, kept), self._constant([1]), keepdims=0)
            vectors = self._node("Div", total, self._node("ReduceSum", kept, self._constant([1]), keepdims=0))
        else:
            raise ValueError(f"the ONNX graph pools by mean or cls; the model's pooling is {encoding['pooling']}")
        if encoding["normalize"]:
            vectors = self._node("Div", vectors, self._node("ReduceL2", vectors, axes=[1], keepdims=1))
        self._node("Identity", vectors, output=OUTPUT)

    def _attention(self, x: str, name: str) -> str:
        """Join over the heads softmax(q·k / sqrt(D) + mask)·v: `[B, S, C]` -> `[B, S, C]`."""
        heads, width = self._config["num_heads"], self._config["hidden_size"]
        query, key, value = (
            self._node("Reshape", self._linear(x, f"{name}.{part}"), self._constant([0, 0, heads, width // heads]))
            for part in ("query", "key", "value")
        )
        query, value = (self._node("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, value))
        scores = self._node("MatMul", query, self._node("Transpose", key, perm=[0, 2, 3, 1]))
        scores = self._node("Div", scores, self._constant((width // heads) ** 0.5))
        pattern = self._node("Softmax", self._node("Add", scores, self._mask), axis=-1)
        context = self._node("Transpose", self._node("MatMul", pattern, value), perm=[0, 2, 1, 3])
        return self._node("Reshape", context, self._constant([0, 0, width]))

    def _linear(self, x: str, name: str) -> str:
        """x·W + b; the weights are stored transposed, as exporters do."""
        weight = self._constant(np.ascontiguousarray(self._tensors[f"{name}.weight"].T))
        return self._node("Add", self._node("MatMul", x, weight), self._weight(f"{name}.bias"))

    def _gelu(self, x: str) -> str:
        """x·(1 + erf(x / sqrt(2)))·0.5."""
        inner = self._node("Erf", self._node("Div", x, self._constant(2**0.5)))
        product = self._node("Mul", x, self._node("Add", inner, self._constant(1.0)))
        return self._node("Mul", product, self._constant(0.5))

    def _norm(self, x: str, name: str) -> str:
        weights = (self._weight(f"{name}.{part}") for part in ("weight", "bias"))
        return self._node("LayerNormalization", x, *weights, axis=-1, epsilon=self._config["layer_norm_eps"])

    def _float(self, x: str) -> str:
        return self._node("Cast", x, to=onnx.TensorProto.FLOAT)

    def _node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node; return its output's name."""
        name = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], name=f"node_{len(self.nodes)}", **attributes))
        return name

    def _weight(self, name: str) -> str:
        return self._constant(self._tensors[name], name)

    def _constant(self, value: Any, name: str | None = None) -> str:
        """Add a constant, whole numbers as int64 and all else as float32; return its name."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name
