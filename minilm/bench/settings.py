"""What a run of the benchmark is to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minilm.bench.engines import Choice
from minilm.bench.peers import DEFAULT_PEERS, PEERS
from minilm.bench.workloads import choose

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""What engines can compute in, and the bytes of a number."""

DEFAULT_SECONDS = {"cpu": 300.0, "cuda": 400.0}
DEFAULT_BACKENDS = {"cpu": ("auto",), "cuda": ("triton", "torch")}
DEFAULT_WORKLOADS = {"cpu": ("texts",), "cuda": ("texts", "tokens", "attention")}


@dataclass(frozen=True)
class Settings:
    """What to measure; what is left out is chosen by the device.

    Attributes:
        backends: ours, or someone's own: what `minilm.load(backend=...)` takes, with `@dtype` behind it if need be.
        peers: names in `minilm.bench.peers.PEERS`, likewise.
        workloads: see `minilm.bench.workloads`.
        device: `cpu`, `cuda` or `cuda:N`; a GPU if there is one.
        model: as in `minilm.load`.
        dtype: what engines compute in that do not say otherwise: float16 on a GPU, else float32.
        threads: each engine runs with each of these thread counts; on a CPU as many as torch takes by itself.
        data: where sentences come from; see `minilm.bench.reference.read_sentences`.
        seconds: how long to take, about; one round is always finished.
        min_cosine: what a backend must reach; by default it depends on its dtype.
        baseline: the engine whose speed is 1 in the report; the first by default.
        sts: whether to evaluate each engine on semantic textual similarity too, on `data`, when all is timed.
        parity: whether to run the parity suite on our backends first; by default on a GPU.

    Raises:
        ValueError: a setting that can't be.
    """

    backends: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    workloads: tuple[str, ...] | None = None
    device: str | None = None
    model: str | None = None
    dtype: str | None = None
    threads: tuple[int, ...] = ()
    data: str | None = None
    seconds: float | None = None
    min_cosine: float | None = None
    baseline: str | None = None
    sts: bool = False
    parity: bool | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything runs."""
        choose(self.workloads or (), self.device or "cpu")
        for name in ("auto", *(self.backends or ()), *(self.peers or ())):
            _split(name, self.dtype or "float32")
        unknown = [name for name in self.peers or () if _split(name, "float32")[0] not in PEERS]
        if unknown:
            raise ValueError(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
        if self.sts and self.data is None:
            raise ValueError("sts needs data: the folder of STS data (see `minilm eval sts --help`)")
        if any(count < 1 for count in self.threads) or (self.seconds is not None and self.seconds <= 0):
            raise ValueError(f"threads and seconds must be positive, got {self.threads} and {self.seconds}")

    def on(self, device: str, threads: int | None = None) -> Settings:
        """Return the settings with everything chosen that was left to the device.

        Args:
            device: the device.
            threads: of every engine on a CPU, if that was left open.

        Raises:
            ValueError: there is no engine, or none that the baseline names.
        """
        kind = device.split(":")[0]
        chosen = replace(
            self,
            backends=self.backends if self.backends is not None else DEFAULT_BACKENDS[kind],
            peers=self.peers if self.peers is not None else DEFAULT_PEERS[kind],
            workloads=tuple(choose(self.workloads or DEFAULT_WORKLOADS[kind], device)),
            device=device,
            threads=self.threads or ((threads,) if threads and kind == "cpu" else ()),
            dtype=self.dtype or ("float16" if kind == "cuda" else "float32"),
            seconds=self.seconds or DEFAULT_SECONDS[kind],
            parity=self.parity if self.parity is not None else kind == "cuda",
        )
        labels = [choice.label for choice in chosen.choices("")]
        if not labels:
            raise ValueError("there is no engine to measure: name one with --backend or --peers")
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(f"the baseline must be one of the engines, {', '.join(labels)}; got {self.baseline!r}")
        return chosen

    def choices(self, scratch: str) -> list[Choice]:
        """Return the engines, each with each thread count."""
        made = {}
        for role, names in (("backend", self.backends or ()), ("peer", self.peers or ())):
            for spec in names:
                name, dtype = _split(spec, self.dtype or "float32")
                for threads in self.threads or (None,):
                    many = len(self.threads) > 1
                    label = f"{spec}, {threads} thread{'s' if threads != 1 else ''}" if many else spec
                    made[label] = Choice(label, role, name, dtype, self.device or "cpu", scratch, threads)
        return list(made.values())


def _split(spec: str, dtype: str) -> tuple[str, str]:
    """Split `name@dtype`.

    Raises:
        ValueError: there is no name, or no such dtype.
    """
    name, mark, own = spec.partition("@")
    if not name or (mark and own not in DTYPES) or dtype not in DTYPES:
        raise ValueError(f"expected an engine as NAME or NAME@DTYPE, DTYPE one of {', '.join(DTYPES)}; got {spec!r}")
    return name, own or dtype
