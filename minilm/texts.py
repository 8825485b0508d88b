"""Reading what a caller calls "texts": one string, or any iterable of them, checked one by one before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Text = str | tuple[str, str]  # a text, or a pair of them
Texts = str | Iterable[str] | Iterable[Text]  # what a caller may give


def as_texts(inputs: Any, *, text_pairs: bool = False) -> tuple[list[Text], bool]:
    """Return the texts as a list, and whether a single text was given.

    Args:
        inputs: a string, or any iterable of strings: list, tuple, generator, numpy array, pandas Series.
        text_pairs: also accept two strings in a list or tuple as one text of two segments.

    Raises:
        TypeError: something that is not a string, named by its position.
        ValueError: a string that is not valid Unicode (a lone surrogate), named by its position.
    """
    if isinstance(inputs, str):
        return [check_text(inputs, "the text")], True
    return list(iter_texts(inputs, text_pairs=text_pairs)), False


def iter_texts(inputs: Any, *, text_pairs: bool = False) -> Iterator[Any]:
    """Check one by one the texts of any iterable but a string, as they are asked for; see `as_texts`.

    Raises:
        TypeError: at once, not an iterable; in its turn, an element that is not a string.
        ValueError: in its turn, an element that is not valid Unicode.
    """
    if isinstance(inputs, bytes | bytearray | Mapping):
        raise _not_texts(inputs)
    if getattr(inputs, "ndim", 1) != 1:  # a table iterates over its column names, an array over its rows
        raise TypeError(f"expected one column of strings, got {type(inputs).__name__} of {inputs.ndim} dimensions")
    try:
        iterator = iter(inputs)
    except TypeError:
        raise _not_texts(inputs) from None
    return (_check_item(item, f"text {index}", text_pairs) for index, item in enumerate(iterator))


def check_text(text: Any, what: str) -> str:
    """Return `text` if it is a valid string.

    Raises:
        TypeError: not a string. ValueError: a lone surrogate in it.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected {what} to be a string, got {_describe(text)}{_remedy(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}; replace it first, for example text.encode('utf-8', 'replace').decode()"
            ) from None
    return text


def _check_item(item: Any, what: str, text_pairs: bool) -> Text:
    """Check one element of the inputs."""
    if text_pairs and isinstance(item, list | tuple):
        if len(item) != 2:
            raise ValueError(f"expected {what} to be a string or a pair of strings, got {len(item)} elements")
        return check_text(item[0], f"the first half of {what}"), check_text(item[1], f"the second half of {what}")
    return check_text(item, what)


def _not_texts(inputs: Any) -> TypeError:
    """Make the error for inputs that are no texts at all."""
    return TypeError(f"expected a string or an iterable of strings, got {_describe(inputs)}")


def _describe(value: Any) -> str:
    """Name a value's type and, shortened, the value."""
    shown = repr(value)
    return f"{type(value).__name__} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def _remedy(value: Any) -> str:
    """Return what to do about a value that is not a string."""
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
        return "; drop missing values or replace them with an empty string first (pandas: series.fillna(''))"
    if isinstance(value, bytes | bytearray):
        return "; decode it first, for example value.decode('utf-8')"
    if isinstance(value, list | tuple):
        return "; pass a flat list of strings"
    return "; convert it with str() first"
