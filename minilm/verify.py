"""Is this model still the model it was? Checked against the fingerprint and the vectors that are kept with it.

An upgrade of torch, of tokenizers or of this package that changed vectors would show here before it shows in a search
index. `minilm weights convert` stores both in the folder it writes; those of all-MiniLM-L6-v2 ship with the package.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilm.encoder import SentenceEncoder
from minilm.weights.checkpoint import Checkpoint

GOLDEN_TEXTS = (
    "A small boat is tied to a pier on a foggy lake.",
    "Café prices rose by 3.5% in 2023 - who would have thought?",
    "",
    "unaffordability [SEP] \U0001f355 東京",
)
TOLERANCE = 1e-5  # of a vector's length; float32 on different CPUs and versions differs by less than 1e-6


@dataclass(frozen=True)
class Check:
    """One comparison: what was checked, whether it held, and the figures."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one model."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check held, and there was one."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        if not self.checks:
            return ["nothing to check: this source has no stored fingerprint or vectors; convert it to store them"]
        width = max(len(check.name) for check in self.checks)
        return [f"{'ok  ' if c.ok else 'FAIL'} {c.name:{width}}  {c.detail}" for c in self.checks]


def verify(encoder: SentenceEncoder) -> VerifyReport:
    """Compare a model, as `minilm.load` returned it, with the fingerprint and golden results kept with it.

    A backend that approximates is left out of it: plain torch computes instead.
    """
    checkpoint = encoder.checkpoint
    actual = encoder.fingerprint()
    checks = []
    if checkpoint.stored_fingerprint is not None:
        stored, same = checkpoint.stored_fingerprint, actual == checkpoint.stored_fingerprint
        detail = actual[:16] if same else f"{actual[:16]}, stored {stored[:16]}: the files have changed"
        checks.append(Check("fingerprint", same, detail))
    exact = encoder.model.backend.min_cosine is None
    with nullcontext() if exact else encoder.model.use_backend("torch"):
        checks += [_check_golden(encoder, expected) for expected in checkpoint.golden or ()]
    return VerifyReport(tuple(checks))


def with_golden(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with what this version computes of it: golden ids and vectors, and calibration."""
    encoder = SentenceEncoder(replace(checkpoint, calibration=None)).to("cpu", "float64")
    golden = [
        {"text": text, "ids": encoder.tokenizer(text).ids, "vector": [float(f"{x:.9g}") for x in encoder.encode(text)]}
        for text in GOLDEN_TEXTS
    ]
    return replace(checkpoint, golden=golden, calibration=encoder.calibration)


def _check_golden(encoder: SentenceEncoder, expected: dict[str, Any]) -> Check:
    """Compare one text's ids and vector with the golden ones."""
    text = expected["text"]
    name = json.dumps(text if len(text) <= 30 else text[:27] + "...", ensure_ascii=False)
    ids = encoder.tokenizer(text).ids
    if ids != expected["ids"]:
        return Check(name, False, f"token ids {ids}, expected {expected['ids']}")
    vector = np.array(expected["vector"])
    difference = float(np.linalg.norm(encoder.encode(text) - vector) / np.linalg.norm(vector))
    return Check(name, difference <= TOLERANCE, f"relative difference {difference:.1e} (limit {TOLERANCE:.0e})")
