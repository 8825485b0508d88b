"""What counts as texts, and what is said about everything else."""

import numpy as np
import pandas as pd
import pytest

from minilm.texts import as_texts


@pytest.mark.parametrize(
    "inputs",
    [
        ["a", "b"],
        ("a", "b"),
        (text for text in "ab"),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        pd.Series(["a", "b"], index=[7, 3]),
        {"a": 1, "b": 2}.keys(),
    ],
    ids=["list", "tuple", "generator", "numpy-str", "numpy-object", "pandas", "keys"],
)
def test_iterables(inputs):
    assert as_texts(inputs) == (["a", "b"], False)


def test_one_string_is_one_text():
    assert as_texts("ab") == (["ab"], True)
    assert as_texts(np.str_("ab")) == (["ab"], True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, r"expected a string or an iterable of strings, got NoneType \(None\)"),
        (3, "got int"),
        (b"text", "got bytes"),
        ({"text": "a"}, "got dict"),
        (np.array(5), "got ndarray of 0 dimensions"),
        (["a", None], "expected text 1 to be a string, got NoneType.*drop missing values"),
        (["a", b"b"], "text 1 .*got bytes.*decode it first"),
        ([["a", "b"]], "text 0 .*got list.*flat list"),
        ([1.5], r"text 0 .*got float \(1.5\); convert it with str\(\) first"),
        (pd.Series(["a", float("nan")]), "text 1 .*drop missing values"),
        (np.array([["a"], ["b"]]), "expected one column of strings, got ndarray of 2 dimensions"),
        (pd.DataFrame({"text": ["a"]}), "expected one column of strings, got DataFrame of 2 dimensions"),
        (["a", pd.NA], "text 1 .*drop missing values"),
    ],
)
def test_other_types_are_refused(inputs, message):
    with pytest.raises(TypeError, match=message):
        as_texts(inputs)


@pytest.mark.parametrize("text", ["\ud800", "fine, then \udfff not"], ids=["high", "low"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(ValueError, match=r"text 1 is not valid Unicode: lone surrogate U\+D[8F].. at character"):
        as_texts(["ok", text])


def test_inputs_that_are_fine_are_not_described():
    class Silent(list):
        def __repr__(self):
            raise AssertionError("the whole input would be written out")

    assert as_texts(Silent(["a", "b"])) == (["a", "b"], False)


def test_pairs_only_on_request():
    assert as_texts([("a", "b"), "c"], text_pairs=True) == ([("a", "b"), "c"], False)
    with pytest.raises(ValueError, match="text 0 to be a string or a pair of strings, got 3 elements"):
        as_texts([["a", "b", "c"]], text_pairs=True)
    with pytest.raises(TypeError, match="the second half of text 0"):
        as_texts([["a", None]], text_pairs=True)
