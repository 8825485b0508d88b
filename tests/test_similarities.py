"""Scores and search against numpy, scipy and a full sort."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from minilm import search, similarity, similarity_pairwise

SCIPY = {
    "cosine": lambda a, b: 1 - cdist(a, b, "cosine"),
    "dot": lambda a, b: a @ b.T,
    "euclidean": lambda a, b: -cdist(a, b, "euclidean"),
    "manhattan": lambda a, b: -cdist(a, b, "cityblock"),
}
A = np.random.default_rng(0).normal(size=(7, 24))
B = np.random.default_rng(1).normal(size=(11, 24))


@pytest.mark.parametrize("metric", SCIPY)
def test_scores_equal_scipy(metric):
    expected = SCIPY[metric](A, B)
    np.testing.assert_allclose(similarity(A, B, metric), expected, atol=1e-12)
    np.testing.assert_allclose(similarity_pairwise(A, B[:7], metric), np.diag(expected), atol=1e-12)


@pytest.mark.parametrize("form", [np.float32, torch.tensor, list], ids=["float32", "tensor", "nested-list"])
def test_forms_of_vectors(form):
    def convert(x):
        return [torch.tensor(row) for row in x] if form is list else form(x)

    np.testing.assert_allclose(similarity(convert(A), convert(B)), SCIPY["cosine"](A, B), atol=1e-6)


def test_one_vector_is_a_row():
    assert similarity(A[0], B).shape == (1, 11)
    assert similarity_pairwise(A[0], A[0]).shape == ()


@pytest.mark.parametrize("a", [A.tolist(), A.astype(np.float16), A.astype(np.int8)], ids=["list", "float16", "int8"])
def test_scores_are_float32(a):
    assert similarity(a, a).dtype == torch.float32


@pytest.mark.parametrize("a", ["a text", None, [["a"]]], ids=["text", "none", "texts"])
def test_what_is_no_vector_is_refused(a):
    with pytest.raises(TypeError, match="expected a to be vectors of numbers"):
        similarity(a, B)


def test_ties_at_the_end_of_the_list():
    corpus = np.array([[0.0], [1.0], [0.5], [1.0], [1.0], [0.5], [1.0]])
    for block_size in (1, 2, 3, 7):
        for top_k in range(1, 8):
            (hits,) = search([[1.0]], corpus, top_k, "dot", block_size)
            assert [hit["corpus_id"] for hit in hits] == [1, 3, 4, 6, 2, 5, 0][:top_k]


def test_integer_vectors_score_as_numbers():
    a, b = np.array([[100, -100]], dtype=np.int8), np.array([[100, 100]], dtype=np.int8)
    assert similarity(a, a, "dot").item() == 20_000
    assert similarity(a, b, "dot").item() == 0


def test_a_zero_vector_scores_zero():
    assert similarity(np.zeros((1, 24)), B, "cosine").abs().max() == 0


@pytest.mark.parametrize("metric", SCIPY)
@pytest.mark.parametrize("block_size", [1, 3, 11, 100])
def test_search_equals_a_full_sort(metric, block_size):
    expected = SCIPY[metric](A, B)
    hits = search(A, B, top_k=4, metric=metric, block_size=block_size)
    for row, row_hits in zip(expected, hits, strict=True):
        order = np.argsort(-row, kind="stable")[:4]
        assert [hit["corpus_id"] for hit in row_hits] == order.tolist()
        np.testing.assert_allclose([hit["score"] for hit in row_hits], row[order], atol=1e-12)


def test_equal_scores_come_in_the_order_of_the_corpus():
    corpus = np.ones((9, 2), dtype=np.float32)
    for block_size in (2, 9):
        hits = search([1.0, 0.0], corpus, top_k=5, block_size=block_size)[0]
        assert [hit["corpus_id"] for hit in hits] == [0, 1, 2, 3, 4]


def test_many_queries_and_small_corpora():
    queries = np.random.default_rng(2).normal(size=(2_500, 8))
    hits = search(queries, queries[:3], top_k=10)
    assert [len(row) for row in hits] == [3] * 2_500
    assert [row[0]["corpus_id"] for row in hits[:3]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity(A, B, "jaccard"), "metric must be one of cosine, dot, euclidean, manhattan; got 'jaccard'"),
        (lambda: similarity(A, B[:, :3]), "vectors of one width, got 24 and 3"),
        (lambda: similarity_pairwise(A, B), "as many rows in a as in b"),
        (lambda: similarity(A[None], B), r"expected a to be vectors \[n, C\]"),
        (lambda: search(A, B, top_k=0), "top_k must be at least 1, got 0"),
        (lambda: search(A, B, block_size=0), "block_size must be at least 1, got 0"),
    ],
    ids=["metric", "width", "rows", "dimensions", "top_k", "block_size"],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
