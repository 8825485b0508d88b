"""Measures of vectors against known values, the papers' formulas written out, and their invariances."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import entropy, ortho_group
from sklearn.decomposition import PCA

from minilm.internals import geometry


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def debiased_hsic(k, l):  # noqa: E741
    """Song et al. 2012, equation 5."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    ones = np.ones(n)
    trace = np.trace(k @ l)
    return (trace + ones @ k @ ones * (ones @ l @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * ones @ k @ l @ ones) / (
        n * (n - 3)
    )


def test_linear_cka_is_kornblith_et_al_s_feature_form(rng):
    x, y = rng.normal(size=(40, 7)) + 3, rng.normal(size=(40, 5)) - 1
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert geometry.cka(x, y) == pytest.approx(expected, abs=1e-12)


def test_rbf_cka_by_its_definition(rng):
    x, y = rng.normal(size=(30, 7)), rng.normal(size=(30, 5))
    h = np.eye(30) - 1 / 30

    def kernel(rows):
        distances = pdist(rows)
        return np.exp(-(squareform(distances) ** 2) / (2 * (0.8 * np.median(distances)) ** 2))

    def hsic(k, l):  # noqa: E741
        return np.trace(k @ h @ l @ h)

    k, l = kernel(x), kernel(y)  # noqa: E741
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert geometry.cka(x, y, "rbf", bandwidth=0.8) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_debiased_cka_is_that_of_the_unbiased_hsic(rng, kernel):
    x = rng.normal(size=(25, 6))
    y = x[:, :3] + rng.normal(size=(25, 3))
    distances = {id(rows): pdist(rows) for rows in (x, y)}

    def gram(rows):
        if kernel == "linear":
            return rows @ rows.T
        apart = distances[id(rows)]
        return np.exp(-(squareform(apart) ** 2) / (2 * (0.5 * np.median(apart)) ** 2))

    k, l = gram(x), gram(y)  # noqa: E741
    expected = debiased_hsic(k, l) / np.sqrt(debiased_hsic(k, k) * debiased_hsic(l, l))
    assert geometry.cka(x, y, kernel, debiased=True) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_of_a_representation_with_itself_however_turned_is_1(rng, kernel, debiased):
    x = rng.normal(size=(50, 8)) * np.arange(1, 9)
    turned = 3 * x @ ortho_group.rvs(8, random_state=1) + 5
    assert geometry.cka(x, x, kernel, debiased=debiased) == pytest.approx(1, abs=1e-12)
    assert geometry.cka(x, turned, kernel, debiased=debiased) == pytest.approx(1, abs=1e-9)


def test_only_debiased_cka_of_unrelated_vectors_is_near_0(rng):
    pairs = [(rng.normal(size=(100, 300)), rng.normal(size=(100, 300))) for _ in range(5)]
    assert min(geometry.cka(x, y) for x, y in pairs) > 0.6
    values = [geometry.cka(x, y, debiased=True) for x, y in pairs]
    assert max(map(abs, values)) < 0.05
    assert min(values) < 0


def test_cka_where_nothing_varies_has_no_value():
    assert np.isnan(geometry.cka(np.ones((5, 3)), np.eye(5)))


def test_effective_rank(rng):
    assert geometry.effective_rank(np.eye(6)) == pytest.approx(6)
    assert geometry.effective_rank(np.outer(rng.normal(size=9), rng.normal(size=4))) == pytest.approx(1, abs=1e-6)
    singular = np.array([5.0, 2.0, 1.0])
    x = ortho_group.rvs(7, random_state=0)[:, :3] * singular @ ortho_group.rvs(3, random_state=1)
    assert geometry.effective_rank(x) == pytest.approx(np.exp(entropy(singular / singular.sum())))


def isoscore_in_steps(x):
    """Rudman et al. 2022, algorithm 1."""
    n = x.shape[1]
    variances = PCA().fit_transform(x).var(axis=0, ddof=1)
    normalised = np.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - 1) / np.sqrt(2 * (n - np.sqrt(n)))
    fraction = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2
    return (n * fraction - 1) / (n - 1)


def test_isoscore(rng):
    x = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 4
    assert geometry.isoscore(x) == pytest.approx(isoscore_in_steps(x), abs=1e-12)
    cross = np.concatenate((np.eye(8)[:3], -np.eye(8)[:3]))  # varies evenly in 3 of 8 dimensions
    assert geometry.isoscore(cross) == pytest.approx(2 / 7)


def test_partition_isotropy():
    cross = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert geometry.partition_isotropy(cross) == pytest.approx(1)
    assert geometry.partition_isotropy([[2.0, 0.0], [2.0, 0.0]]) == pytest.approx(np.exp(-4))  # Z: 2e², 2, 2, 2e⁻²
    assert geometry.partition_isotropy([[2000.0, 0.0]]) == 0  # and no overflow


def test_mean_cosine_uniformity_and_alignment(rng):
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 4))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    assert geometry.mean_cosine(x) == pytest.approx(1 - pdist(x, "cosine").mean())
    assert geometry.uniformity(x) == pytest.approx(np.log(np.exp(-2 * pdist(a) ** 2).mean()))
    assert geometry.alignment(x, y) == pytest.approx(np.mean([((p - q) ** 2).sum() for p, q in zip(a, b, strict=True)]))


def test_tensors_are_taken():
    x = torch.arange(12.0, requires_grad=True).reshape(4, 3)
    assert geometry.cka(x, x.detach().numpy()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.cka(np.eye(3), np.eye(4)), "same texts, got 3 and 4 rows"),
        (lambda: geometry.cka(np.eye(3), np.eye(3), debiased=True), "at least 4 rows, got 3"),
        (lambda: geometry.cka(np.eye(3), np.eye(3), "cubic"), "linear, rbf"),
        (lambda: geometry.cka(np.eye(3), np.eye(3), "rbf", bandwidth=0), "bandwidth above 0"),
        (lambda: geometry.cka([[0.1], [0.1], [0.1], [0.1], [1.0]], np.eye(5), "rbf"), "median distance"),
        (lambda: geometry.effective_rank(np.zeros((2, 2))), "all zero"),
        (lambda: geometry.effective_rank([1.0, 2.0]), r"matrix \[n, C\]"),
        (lambda: geometry.effective_rank([[np.nan]]), "finite"),
        (lambda: geometry.isoscore(np.ones((3, 3))), "different rows"),
        (lambda: geometry.mean_cosine([[1.0, 0.0], [0.0, 0.0]]), "row 1 is zero"),
        (lambda: geometry.mean_cosine([[1.0]]), "at least 2 rows"),
        (lambda: geometry.uniformity([[1.0]]), "at least 2 rows"),
        (lambda: geometry.alignment(np.eye(2), np.eye(3)), "one shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
