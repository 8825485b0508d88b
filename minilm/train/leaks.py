"""No evaluation sentence may be in the training data: exact matches of normalised texts.

A text is normalised by Unicode's NFKD (accents come apart, ligatures and wide forms become plain letters), by case
folding, and by dropping all that is neither letter nor digit: blanks, punctuation, accents. They hide no match then.
Near-duplicates (a word more, or another) are not found.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from minilm.evaluate.sts_data import TASKS, read_sts
from minilm.train.mixtures import Mixture
from minilm.train.rows import DataError

logger = logging.getLogger(__name__)

ON_LEAK = ("error", "drop")
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")
_ASCII_DROPPED = {code: None for code in range(128) if not chr(code).isalnum()}


class Leak(NamedTuple):
    """An evaluation sentence among the texts.

    Attributes:
        row: which text, as the texts were numbered.
        text: the text.
        evaluation: where the sentence is evaluated, such as `stsb test`.
    """

    row: int
    text: str
    evaluation: str


def normalize_text(text: str) -> str:
    """Return what is compared of a text; see this module."""
    if text.isascii():  # the same, in half the time
        return text.lower().translate(_ASCII_DROPPED)
    return _NEITHER_LETTER_NOR_DIGIT.sub("", unicodedata.normalize("NFKD", text).casefold())


def evaluation_sentences(data: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return every sentence that STS models are chosen or judged by, normalised, and where it is from.

    These are the test sets of the seven tasks, and the dev sets of STS-B and SICK.

    Args:
        data: the folder of the STS data, or None for the public sets (`minilm.evaluate.sts_data`), whose SICK is whole.

    Raises:
        EvaluationDataError: the data is missing, malformed or out of reach.
    """
    dev_tasks = ["stsb"] if data is None else ["stsb", "sickr"]
    found: dict[str, str] = {}
    for split, tasks in (("test", list(TASKS)), ("dev", dev_tasks)):
        for name, task in read_sts(data, tasks, split).items():
            for pairs in task.values():
                for sentence in (*pairs.first, *pairs.second):
                    found.setdefault(normalize_text(sentence), f"{name} {split}")
    found.pop("", None)  # nothing but punctuation
    return found


def find_leaks(texts: Iterable[tuple[int, str]], evaluation: Mapping[str, str]) -> Iterator[Leak]:
    """Give the texts that are evaluation sentences, as they are met.

    Args:
        texts: numbered texts, such as `Mixture.texts()`.
        evaluation: as `evaluation_sentences` returns them.
    """
    for row, text in texts:
        where = evaluation.get(normalize_text(text))
        if where is not None:
            yield Leak(row, text, where)


def without_leaks(mixture: Mixture, evaluation: Mapping[str, str], on_leak: str = "error") -> Mixture:
    """Return a mixture that no evaluation sentence is in.

    Args:
        mixture: what is to be trained on.
        evaluation: as `evaluation_sentences` returns them.
        on_leak: `error`, or `drop` to leave out the rows that hold one, with a warning.

    Raises:
        DataError: there is one, named with its file and line, and it is not to be dropped.
        ValueError: `on_leak` is neither.
    """
    if on_leak not in ON_LEAK:
        raise ValueError(f"on_leak must be one of {', '.join(ON_LEAK)}; got {on_leak!r}")
    leaks = list(find_leaks(mixture.texts(), evaluation))
    if not leaks:
        return mixture
    named = [f"{mixture.where(leak.row)}: {leak.text!r} ({leak.evaluation})" for leak in leaks[:5]]
    message = f"{len(leaks)} training texts are evaluation sentences, such as {'; '.join(named)}"
    if on_leak == "error":
        raise DataError(f'{message}; remove them, or set on_leak = "drop"')
    logger.warning("%s; the rows that hold them are left out", message)
    return mixture.without(np.array([leak.row for leak in leaks]))
