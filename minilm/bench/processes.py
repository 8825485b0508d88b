"""One engine, one process: started, asked in lines of JSON, and ended without fail."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds to end in, before being killed
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class WorkerError(RuntimeError):
    """A worker raised, died, or gave no answer in time.

    Args:
        summary: what happened, in a line.
        raised: the whole message of what it raised, if it did; then it still answers.
    """

    def __init__(self, summary: str, raised: str | None = None) -> None:
        super().__init__(summary)
        self.message = raised or summary
        self.is_over = raised is None


class Worker:
    """A process that runs `minilm.bench.worker`, until it is closed.

    It has a session of its own, so that Ctrl-C reaches it only through us, and ends when our end of its input closes,
    however that comes about: no worker outlives the benchmark.

    Args:
        name: what it is called in messages.
        log: the file for what it and its libraries write.
        threads: how many threads its libraries are to use; as they like if None.
        offline: whether to keep libraries from asking hubs about what is in a folder here anyway.
    """

    def __init__(self, name: str, log: Path, threads: int | None = None, *, offline: bool = True) -> None:
        self.name = name
        self._log_path = log
        self._closed = False
        variables = {"ORT_DISABLE_TELEMETRY": "1"}
        if offline:
            variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if threads is not None:
            variables |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        code = f"import sys; sys.path[:] = {sys.path!r}; from minilm.bench.worker import main; main()"
        self._log = log.open("wb")
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **variables},
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, do: str, patience: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; see `send` and `receive`."""
        self.send(do, **request)
        return self.receive(patience)

    def send(self, do: str, **request: Any) -> None:
        """Send a request: what to do, and with what.

        Raises:
            WorkerError: the process is gone.
        """
        assert self._process.stdin is not None
        if self._closed:
            raise WorkerError("the process was ended")
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def receive(self, patience: float) -> dict[str, Any]:
        """Wait for an answer; `arrived` in it is when it came, by `time.perf_counter`.

        Raises:
            WorkerError: the request raised, the process died, or `patience` seconds passed (then it is killed).
        """
        try:
            line, arrived = self._answers.get(timeout=patience)
        except queue.Empty:
            self.close(grace=0)
            raise WorkerError(f"no answer in {patience:.0f} s") from None
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["message"])
        return {**answer, "arrived": arrived}

    def close(self, grace: float = GRACE) -> None:
        """End the process, and every process it started; once is enough, more do no harm."""
        if self._closed:
            return
        self._closed = True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # if it is gone already
            self._process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        finally:
            self._kill()
            with suppress(subprocess.TimeoutExpired):  # if it hangs in a driver; then it can't be waited for
                self._process.wait(GRACE)
            self._reader.join(GRACE)
            if not self._reader.is_alive():
                self._process.stdout.close()
            self._log.close()

    def _kill(self) -> None:
        """Kill what is left of the process's group."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except AttributeError:  # no groups on this system
            self._process.kill()
        except (ProcessLookupError, PermissionError):
            pass  # nothing is left (macOS says so by PermissionError)

    def _read(self) -> None:
        """Pass on the lines that the process writes, then an empty one."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((line, time.perf_counter()))
        self._answers.put(("", time.perf_counter()))

    def _death(self) -> WorkerError:
        """Say how the process ended, with the last line it wrote."""
        self.close()
        code = self._process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return WorkerError(f"the process {how}: {lines[-1].strip()}" if lines else f"the process {how}")
