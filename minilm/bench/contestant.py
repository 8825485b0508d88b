"""An engine that takes part in a run, as the run sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minilm.bench.engines import Choice
from minilm.bench.processes import Worker, WorkerError

Result = TypeVar("Result")


@dataclass
class Contestant:
    """An engine in its process, and what is known of it.

    Attributes:
        choice: which it is.
        worker: its process.
        loaded: what loading it returned.
        ready: by workload, what the first call returned.
        failed: by workload, why it can't be measured.
        samples: by workload, the median seconds of a call in each round.
        parity: the rows of the parity suite, if it was run.
        extras: by workload, what is measured once.
        sts: Spearman's correlation x 100 by task, and their average; empty if it was not evaluated.
        peak_memory: bytes its process held at most.
        error: what ended it.
    """

    choice: Choice
    worker: Worker
    loaded: dict[str, Any] = field(default_factory=dict)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    sts: dict[str, Any] = field(default_factory=dict)
    parity: list[dict[str, Any]] = field(default_factory=list)
    peak_memory: int | None = None
    error: str | None = None

    def asked(self, do: str, **request: Any) -> bool:
        """Send a request, if the engine is still there to get it."""
        if self.error is None:
            self._trying(lambda: self.worker.send(do, **request))
        return self.error is None

    def answered(self, seconds: float, workload: str | None = None) -> dict[str, Any] | None:
        """Return the answer; None, with the reason kept, if there is none, and then the engine takes no more part.

        Args:
            seconds: how long to wait.
            workload: what the request was about; if only that failed, the engine goes on with the others.
        """
        return self._trying(lambda: self.worker.receive(seconds), workload) if self.error is None else None

    def _trying(self, step: Callable[[], Result], workload: str | None = None) -> Result | None:
        try:
            return step()
        except WorkerError as error:
            if workload is not None and not error.is_over:
                self.failed[workload] = str(error)
                del self.ready[workload]
                return None
            self.error = str(error)
            self.worker.close(grace=0)
            return None

    def load(self, answer: dict[str, Any] | None) -> None:
        """Keep what loading returned, and how long it took since the process was started."""
        if answer is not None:
            self.loaded = {**answer, "first_vector_seconds": answer["arrived"] - self.worker.started}

    def prepare(self, answer: dict[str, Any] | None) -> None:
        """Keep what can be measured, and why the rest can't."""
        if answer is not None:
            self.ready, self.failed = answer["ready"], answer["failed"]
