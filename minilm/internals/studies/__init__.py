"""Worked studies: questions about the model, each a short file whose `run(encoder)` returns a `StudyResult`.

`minilm study NAME` runs one.
"""

from minilm.internals.studies.result import StudyResult

__all__ = ["StudyResult"]
