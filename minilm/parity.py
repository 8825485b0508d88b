"""Is a backend right? Each operation, its gradients and whole vectors, against float64 and plain torch.

The rule is flash-attention's: at each dtype, a backend's largest error against float64 may be twice that of plain torch
at the same dtype, plus a floor of a few roundings. Errors are relative to the largest entry of the float64 result.
Operations in float64 get the operands that the others get, rounded to the dtype; whole vectors, the weights unrounded.
A backend that approximates states the cosine to the truth that it keeps (`TorchBackend.min_cosine`): for it, errors and
limits are distances of cosines from 1, of each whole result; its gradients are held to the rule above.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from minilm.activations import ensure_input_ranges
from minilm.batch import PackedBatch
from minilm.config import POOLINGS
from minilm.encoder import SentenceEncoder
from minilm.kernels.backend import BackendChoice, make_backend
from minilm.kernels.torch_backend import TorchBackend
from minilm.model import Layer, MiniLM, MiniLMOutput
from minilm.progress import progress_bar

LENGTHS = {
    "one token": [1],
    "ragged": [1, 2, 15, 16, 17, 127, 128, 129],
    "512 tokens": [512],
    "300 sequences": [1 + i % 9 for i in range(300)],
}
QUICK = ("one token", "ragged")
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float16, torch.bfloat16, torch.float32)}

Outcome = Callable[[TorchBackend, MiniLM, PackedBatch, dict[str, Tensor]], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """How one operation did at one dtype, in the case that went worst.

    Attributes:
        operation: its name; `... gradients` for those of all its operands.
        dtype: what it computed in.
        case: whose error was largest beside what was allowed; a key of `LENGTHS`.
        error: the backend's largest error against float64, relative to the largest entry; or 1 less a cosine.
        plain: plain torch's.
        limit: what was allowed: `2 * plain` and a floor; or 1 less the cosine that the backend promises.
        failure: the exception it raised instead, if it did.
    """

    operation: str
    dtype: str
    case: str
    error: float
    plain: float
    limit: float
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.failure is None and self.error <= self.limit  # a NaN is within none


def check_parity(
    encoder: SentenceEncoder,
    choice: BackendChoice,
    texts: Sequence[str],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
    show_progress_bar: bool | None = None,
) -> list[Row]:
    """Hold a backend against float64 and plain torch, operation by operation and from text to vector.

    Args:
        encoder: the real weights, on the device to check on; it is left as it was.
        choice: the backend; see `minilm.kernels.backend.make_backend`.
        texts: what to encode.
        dtypes: what to compute in; by default all that are usual on the device.
        quick: leave out the larger cases.
        show_progress_bar: as in `SentenceEncoder.encode`.

    Raises:
        BackendError: the backend can't be found, or can't run on this device.
    """
    device = encoder.device.type
    with encoder.model.use_backend(choice):  # or raise
        ensure_input_ranges(encoder.model, encoder.tokenizer)
    dtypes = tuple(dtypes or DTYPES.get(device, DTYPES["cpu"]))
    cases = {name: lengths for name, lengths in LENGTHS.items() if name in QUICK or not quick}
    rows: list[Row] = []
    with progress_bar(show_progress_bar, len(dtypes) * (len(OPERATIONS) + 1), "check", "operation") as advance:
        for dtype in dtypes:
            trial = Trial(encoder, choice, dtype, cases)
            for operation, compute in OPERATIONS.items():
                rows += trial.rows(operation, compute)
                advance(1)
            rows.append(trial.vectors(texts))
            advance(1)
    return rows


class Trial:
    """One backend at one dtype: a model it shares with plain torch, and their float64 twin."""

    def __init__(
        self, encoder: SentenceEncoder, choice: BackendChoice, dtype: torch.dtype, cases: dict[str, list[int]]
    ) -> None:
        self.encoder = encoder
        self.dtype = dtype
        self.model = copy.deepcopy(encoder.model).to(dtype).eval()
        self.exact = copy.deepcopy(self.model).double()
        self.backend = make_backend(choice, encoder.config, encoder.device.type)
        self.plain = TorchBackend(encoder.config)
        self.choice = choice
        self.batches = {
            name: _batch([min(n, encoder.config.max_positions) for n in lengths], encoder.device)
            for name, lengths in cases.items()
        }
        self.operands = {name: _operands(self.exact, batch, dtype) for name, batch in self.batches.items()}

    def rows(self, operation: str, compute: Outcome) -> Iterator[Row]:
        """Check one operation's results, and its gradients, in every case."""
        for name, gradients in ((operation, False), (f"{operation}, gradients", True)):
            if gradients and (operation in NOT_DIFFERENTIABLE or not self.backend.differentiable):
                continue
            outcomes = [self._row(name, case, compute, gradients) for case in self.batches]
            yield max(outcomes, key=lambda row: (not row.ok, row.error / row.limit))

    def _row(self, name: str, case: str, compute: Outcome, gradients: bool) -> Row:
        """Compute one operation three times: exactly, plainly, and by the backend."""
        evaluate, batch = _gradients if gradients else _values, self.batches[case]
        operands = {k: x.clone() for k, x in self.operands[case].items()}  # a backend may write into what it is given
        with torch.inference_mode(not gradients):
            exact = evaluate(compute, self.plain, self.exact, batch, {k: x.double() for k, x in operands.items()})
            found = evaluate(compute, self.plain, self.model, batch, operands)
            attempt = partial(evaluate, compute, self.backend, self.model, batch, operands)
            floor = max(FLOORS[x.dtype] for x in found)
            return self._judged(name, case, attempt, exact, found, floor, approximate=not gradients)

    def _judged(
        self,
        name: str,
        case: str,
        attempt: Callable[[], Sequence[Tensor]],
        exact: Sequence[Tensor],
        plain: Sequence[Tensor],
        floor: float,
        approximate: bool = True,
    ) -> Row:
        """Compare what the backend computes with the truth; whatever an experiment raises is its result."""
        promised, dtype = self.backend.min_cosine, str(self.dtype).removeprefix("torch.")
        if promised is None or not approximate:
            measure, own = _error, _error(plain, exact)
            limit = 2 * own + floor
        else:
            measure, own, limit = _cosine_error, _cosine_error(plain, exact), 1 - promised
        try:
            return Row(name, dtype, case, measure(attempt(), exact), own, limit)
        except Exception as failure:
            message = f"{type(failure).__name__}: {failure}".splitlines()[0]
            return Row(name, dtype, case, float("nan"), own, limit, message)

    def vectors(self, texts: Sequence[str]) -> Row:
        """Check whole vectors, from texts, against float64 with the weights as they are."""

        def encode(model: MiniLM, choice: BackendChoice) -> list[Tensor]:
            twin = copy.copy(self.encoder)
            twin.model = model
            with model.use_backend(choice):
                vectors: Tensor = twin.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)
            return list(vectors.double())

        exact = encode(copy.deepcopy(self.encoder.model).double(), "torch")
        plain, case = encode(self.model, "torch"), f"{len(texts)} texts"
        attempt = partial(encode, self.model, self.choice)
        return self._judged("vectors", case, attempt, exact, plain, FLOORS[self.dtype])


# The operations, each on operands of the third layer.


def _layer(model: MiniLM) -> Layer:
    return model.layers[min(2, len(model.layers) - 1)]


OPERATIONS: dict[str, Outcome] = {
    "embed": lambda backend, model, batch, _: backend.embed(batch, model.embeddings),
    "project_heads": lambda backend, model, _, x: backend.project_heads(x["hidden"], _layer(model).attention),
    "attention": lambda backend, _, batch, x: backend.attention(x["query"], x["key"], x["value"], batch),
    "attention_probabilities": lambda backend, _, batch, x: backend.attention_probabilities(
        x["query"], x["key"], batch
    ),
    "attention_block": lambda backend, model, batch, x: backend.attention_block(x["hidden"], _layer(model), batch),
    "linear": lambda backend, model, _, x: backend.linear(x["hidden"], _layer(model).feed_forward.intermediate),
    "gelu": lambda backend, _, __, x: backend.gelu(x["inner"]),
    "layer_norm": lambda backend, model, _, x: backend.layer_norm(x["update"], _layer(model).feed_forward_norm),
    "add_layer_norm": lambda backend, model, _, x: backend.add_layer_norm(
        x["update"], x["hidden"], _layer(model).feed_forward_norm
    ),
    "feed_forward_block": lambda backend, model, _, x: backend.feed_forward_block(x["hidden"], _layer(model)),
    "pool": lambda backend, _, batch, x: [
        backend.pool((x["hidden"], x["other"]), batch, pooling) for pooling in POOLINGS
    ],
    "pool, normalised": lambda backend, _, batch, x: [
        backend.pool((x["hidden"], x["other"]), batch, pooling, normalize=True) for pooling in POOLINGS
    ],
    "encoder": lambda backend, model, batch, _: _encoder(backend, model, batch),
}
NOT_DIFFERENTIABLE = ("attention_probabilities",)  # nothing trains through these


def _encoder(backend: TorchBackend, model: MiniLM, batch: PackedBatch) -> Tensor:
    """Return the last hidden state."""
    with model.use_backend(type(backend)):
        output: MiniLMOutput = model(batch)
    return output.last_hidden_state


def _operands(exact: MiniLM, batch: PackedBatch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the operations are given: real activations of the third layer, rounded to `dtype`."""
    plain, layer = TorchBackend(exact.config), _layer(exact)
    with torch.no_grad():
        states = [exact.embeddings(batch, plain)]
        for each in exact.layers[: min(2, len(exact.layers) - 1)]:
            states.append(each(states[-1], batch, plain))
        query, key, value = plain.project_heads(states[-1], layer.attention)
        inner = plain.linear(states[-1], layer.feed_forward.intermediate)
        update = plain.linear(plain.gelu(inner), layer.feed_forward.output)
    named = {"query": query, "key": key, "value": value, "inner": inner, "update": update}
    return {name: x.to(dtype) for name, x in {"hidden": states[-1], "other": states[0], **named}.items()}


def _values(
    compute: Outcome, backend: TorchBackend, model: MiniLM, batch: PackedBatch, operands: dict[str, Tensor]
) -> list[Tensor]:
    """Return an operation's results."""
    result = compute(backend, model, batch, operands)
    return [result] if isinstance(result, Tensor) else list(result)


def _gradients(
    compute: Outcome, backend: TorchBackend, model: MiniLM, batch: PackedBatch, operands: dict[str, Tensor]
) -> list[Tensor]:
    """Return the gradients of an operation's results, weighed by fixed random numbers, in operands and parameters."""
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    results = _values(compute, backend, model, batch, leaves)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    wanted: list[Tensor | nn.Parameter] = [*leaves.values(), *model.parameters()]
    found = torch.autograd.grad(results, wanted, upstream, allow_unused=True)
    return [x for x in found if x is not None]


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error, relative to the tensor's largest entry; NaN if one has another shape, or a NaN.

    A tensor is taken to have entries of a thousandth of all tensors' largest at least: some gradients are exactly 0.
    """
    if len(found) != len(exact) or any(a.shape != b.shape for a, b in zip(found, exact, strict=True)):
        return float("nan")
    largest = [float(x.abs().max()) for x in exact]
    least = max(1e-3 * max(largest), 1e-30)
    errors = [
        (a.detach().double() - b).abs().max() / max(scale, least)
        for a, b, scale in zip(found, exact, largest, strict=True)
    ]
    return float(torch.stack(errors).max())


def _cosine_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return how far below 1 the cosine between all results, as one vector, and their truth is; NaN as above."""
    if len(found) != len(exact) or any(a.shape != b.shape for a, b in zip(found, exact, strict=True)):
        return float("nan")
    ours, truth = (torch.cat([x.double().flatten() for x in results]) for results in (found, exact))
    return 1 - float(torch.cosine_similarity(ours, truth, dim=0, eps=1e-30))


def _batch(lengths: list[int], device: torch.device) -> PackedBatch:
    """Return sequences of random word ids."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1_000, 20_000, (sum(lengths),), generator=generator).tolist()
    ends = list(accumulate(lengths))
    return PackedBatch.from_sequences([ids[end - n : end] for n, end in zip(lengths, ends, strict=True)], None, device)
