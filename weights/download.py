"""Fetching over a network so that it ends in seconds, shows progress, and leaves nothing half-written.

Every download runs in a child Python (pip, huggingface_hub, modelscope). The bytes that arrive on disk are both its
progress and its sign of life: whatever a client does about timeouts, retries and name servers, a child that brings
nothing is ended. Its environment, not ours, holds the settings it needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

STALL_SECONDS = 30.0  # a download that has begun may pause for as long
_POLL_SECONDS = 0.2
_STALE_SECONDS = 24 * 3600.0
_SCRATCH = ".partial-"
# Without it a file in the current folder could stand in for a module (PYTHONSAFEPATH is not known to Python 3.10).
_SAFE_PATH = "import sys; sys.path[:1] = [folder for folder in sys.path[:1] if folder]\n"


class SourceError(OSError):
    """A source of weights gave none; the message says why and what to do."""


def run_python(
    code: str,
    arguments: Sequence[str],
    watch: Path,
    description: str,
    *,
    patience: float,
    expected_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run code in a Python of its own, nothing of it on our streams but a progress bar on stderr after a second.

    Args:
        code: what to run; modules in the current folder are not seen.
        arguments: its `sys.argv[1:]`.
        watch: the folder it downloads to, which need not exist yet.
        description: the progress bar's label.
        patience: seconds to wait for the first byte.
        expected_bytes: the progress bar's total, if known.
        environment: variables added to ours.

    Raises:
        SourceError: it failed, with the last lines it wrote; or no byte came for too long, and it was ended.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SAFE_PATH + code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        try:
            stall = _wait(process, watch, description, patience, expected_bytes)
        finally:  # on Ctrl-C too
            process.kill()
            process.wait()
        if stall or process.returncode:
            reasons = filter(None, (stall, _last_lines(output)))
            raise SourceError(" | ".join(reasons) or f"ended with status {process.returncode}")


def _wait(process: subprocess.Popen[bytes], watch: Path, label: str, patience: float, total: int | None) -> str:
    """Return when the process has ended, or, with a reason, when nothing arrives any more."""
    from tqdm.auto import tqdm

    first = last = _bytes_under(watch)
    deadline = time.monotonic() + patience
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
                return ""
            now = _bytes_under(watch)
            if now != last:
                last, patience = now, STALL_SECONDS
                deadline = time.monotonic() + patience
                bar.n = min(max(0, now - first), total or now)
                bar.refresh()
            elif time.monotonic() > deadline:
                return f"nothing arrived for {patience:.0f} seconds"


def _bytes_under(folder: Path) -> int:
    """Return the sizes of all files under a folder, which may change meanwhile, added up."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _last_lines(output: IO[bytes]) -> str:
    """Return the end of what a child wrote, in one line."""
    output.seek(0)
    lines = [" ".join(line.split()) for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(line if len(line) <= 300 else f"{line[:300]}..." for line in lines[-3:])


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, and remove it in the end, with those that killed processes left there.

    Raises:
        SourceError: a file could not be written: no permission, no space, a file in the way.
    """
    scratch = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        yield scratch
    except SourceError:
        raise
    except OSError as error:
        remedy = "Point MINILM_CACHE at a folder that can be written and has 300 MB free"
        raise SourceError(f"cannot write to {parent} ({error}). {remedy}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove scratch folders that no running process can still be using."""
    for left in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)


def move_into_place(folder: Path, destination: Path) -> Path:
    """Rename a finished folder to `destination`, unless another process was first; then theirs is kept."""
    try:
        folder.rename(destination)
    except OSError:
        if not (destination / "model.safetensors").is_file():
            raise
    return destination
