"""Each loss equals an independent evaluation, has the right gradient, and refuses what makes no sense."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, logsumexp

from minilm.train import losses

GENERATOR = np.random.default_rng(0)
A, B, NEGATIVES = (GENERATOR.normal(size=(n, 6)) for n in (5, 5, 4))
WIDE = GENERATOR.normal(size=(5, 9))
SCORES = np.array([0.1, 0.9, 0.1, 0.5, 1.0])  # two of them equal


def cosines(a, b):
    return 1 - cdist(a, b, "cosine")


def off_diagonal(matrix):
    return np.stack([np.delete(row, i) for i, row in enumerate(matrix)])


def info_nce(temperature=0.05, *candidates):
    return -np.diag(log_softmax(cosines(A, np.concatenate(candidates)) / temperature, axis=1)).mean()


def similarity_kl(student, teacher, temperature, stretch=1.0):
    scaled = (stretch * cosines(teacher, teacher), cosines(student, student))
    log_p, log_q = (log_softmax(off_diagonal(x) / temperature, axis=1) for x in scaled)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()


def ranking(queries, passages):
    group = len(passages) // len(queries)
    return np.mean([logsumexp(passages @ q) - q @ passages[i * group] for i, q in enumerate(queries)])


def crd(anchors, candidates, c, temperature, texts=50_000):
    """As the published code has it: P = exp(cos/tau)/Z with Z = c·N, against k noise rows of probability 1/N each."""
    probability = np.exp(cosines(anchors, candidates) / temperature) / (c * texts)
    noise = (len(candidates) - 1) / texts
    same = np.eye(*probability.shape, dtype=bool)
    return -np.log(np.where(same, probability, noise) / (probability + noise)).sum() / len(anchors)


def rbf(x, gamma):
    return np.exp(-gamma * cdist(x, x, "sqeuclidean"))


def hsic_by_centring(x, y, gamma):
    n = len(x)
    centring = np.eye(n) - 1 / n
    return np.trace(rbf(x, gamma) @ centring @ rbf(y, gamma) @ centring) / (n - 1) ** 2


def hsic_of_three_terms(x, y, gamma):
    """As the published code of IBKD has it."""
    n, k, l = len(x), rbf(x, gamma), rbf(y, gamma)  # noqa: E741
    return (np.trace(k @ l) / n**2 + k.mean() * l.mean() - 2 * (k @ l).mean() / n) * n**2 / (n - 1) ** 2


def cosent(temperature):
    cos = np.diag(cosines(A, B))
    pairs = [(i, j) for i in range(5) for j in range(5) if SCORES[i] > SCORES[j]]
    return math.log(1 + sum(math.exp((cos[j] - cos[i]) / temperature) for i, j in pairs))


symmetric = (info_nce(0.1, B) - np.diag(log_softmax(cosines(B, A) / 0.1, axis=1)).mean()) / 2
CASES = {  # loss, its tensors, its settings, the value expected
    "info_nce": (losses.info_nce, [A, B], {}, info_nce(0.05, B)),
    "info_nce, negatives": (losses.info_nce, [A, B, NEGATIVES], {"temperature": 0.2}, info_nce(0.2, B, NEGATIVES)),
    "info_nce, symmetric": (losses.info_nce, [A, B], {"symmetric": True, "temperature": 0.1}, symmetric),
    "simcse_unsupervised": (losses.simcse_unsupervised, [A, B], {}, info_nce(0.05, B)),
    "simcse_supervised": (losses.simcse_supervised, [A, B, A[::-1].copy()], {}, info_nce(0.05, B, A[::-1])),
    "ranking": (losses.ranking, [A[:2], NEGATIVES], {}, ranking(A[:2], NEGATIVES)),
    "mse": (losses.mse, [A, B], {}, np.square(A - B).mean()),
    "similarity_squared_error": (
        losses.similarity_squared_error,
        [A, WIDE],
        {},
        np.square(off_diagonal(cosines(A, A) - cosines(WIDE, WIDE))).mean(),
    ),
    "similarity_squared_error, stretched": (
        losses.similarity_squared_error,
        [A, WIDE],
        {"stretch": 2.5},
        np.square(off_diagonal(cosines(A, A) - 2.5 * cosines(WIDE, WIDE) + 1.5)).mean(),
    ),
    "similarity_kl": (losses.similarity_kl, [A, WIDE], {"temperature": 0.3}, similarity_kl(A, WIDE, 0.3)),
    "similarity_kl, stretched": (
        losses.similarity_kl,
        [A, WIDE],
        {"temperature": 0.3, "stretch": 2.5},
        similarity_kl(A, WIDE, 0.3, 2.5),
    ),
    "crd": (
        losses.crd,
        [A, np.concatenate([B, NEGATIVES])],
        {"log_constant": math.log(1.7)},
        crd(A, np.concatenate([B, NEGATIVES]), 1.7, 0.07),
    ),
    "hsic": (losses.hsic, [A, WIDE], {"gamma": 0.1}, hsic_by_centring(A, WIDE, 0.1)),
    "cosine_regression": (
        losses.cosine_regression,
        [A, B, SCORES],
        {},
        np.square(np.diag(cosines(A, B)) - SCORES).mean(),
    ),
    "cosent": (losses.cosent, [A, B, SCORES], {"temperature": 0.1}, cosent(0.1)),
}
each_loss = pytest.mark.parametrize(("loss", "arrays", "settings", "expected"), CASES.values(), ids=CASES)


def tensors(arrays, dtype=torch.float64):
    """Vectors with gradients; scores, which have one dimension, without."""
    return [torch.tensor(array, dtype=dtype, requires_grad=array.ndim > 1) for array in arrays]


@each_loss
def test_equals_an_independent_evaluation(loss, arrays, settings, expected):
    value = loss(*tensors(arrays), **settings)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-12)


@each_loss
def test_gradient(loss, arrays, settings, expected):  # noqa: ARG001
    assert torch.autograd.gradcheck(lambda *given: loss(*given, **settings), tensors(arrays))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_computed_in_float32(loss, arrays, settings, expected, dtype):  # noqa: ARG001
    narrow = tensors(arrays, dtype)
    wide = [x.detach().double() for x in narrow]
    value = loss(*narrow, **settings)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*wide, **settings).item(), rel=1e-5)
    value.backward()
    assert narrow[0].grad.dtype == dtype


@each_loss
def test_autocast_changes_nothing(loss, arrays, settings, expected):  # noqa: ARG001
    given = tensors(arrays, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*given, **settings)
    assert value.dtype == torch.float32
    assert value.item() == loss(*given, **settings).item()


SENTENCE_TRANSFORMERS = {
    "MultipleNegativesRankingLoss": (losses.info_nce, [A, B, B[::-1].copy()], {"scale": 20.0}, {}),
    "both directions": (
        losses.info_nce,
        [A, B],
        {"scale": 10.0, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"symmetric": True, "temperature": 0.1},
    ),
    "CosineSimilarityLoss": (losses.cosine_regression, [A, B, SCORES], {}, {}),
    "CoSENTLoss": (losses.cosent, [A, B, SCORES], {"scale": 20.0}, {}),
}


@pytest.mark.parametrize("case", SENTENCE_TRANSFORMERS)
def test_equals_sentence_transformers(case):
    theirs = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    loss, arrays, their_settings, settings = SENTENCE_TRANSFORMERS[case]
    name = case if case.endswith("Loss") else "MultipleNegativesRankingLoss"
    given = tensors(arrays, torch.float32)
    vectors, labels = [x for x in given if x.dim() > 1], [x for x in given if x.dim() == 1]
    their_loss = getattr(theirs, name)(torch.nn.Identity(), **their_settings)
    expected = their_loss.compute_loss_from_embeddings(vectors, *(labels or [None]))
    value = loss(*given, **settings)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, yours in zip(*(torch.autograd.grad(x, vectors) for x in (value, expected)), strict=True):
        assert torch.allclose(mine, yours, rtol=1e-4, atol=1e-6)


def test_hard_negatives_may_come_by_row():
    queries, positives, negatives = (torch.tensor(x) for x in (A, B, np.stack([A, -B], axis=1)))  # [5, 2, 6]
    flat = losses.info_nce(queries, positives, negatives.flatten(0, 1))
    assert losses.info_nce(queries, positives, negatives).item() == flat.item()


def test_crd_constant_is_the_mean_over_noise():
    candidates = np.concatenate([B, NEGATIVES])
    ratios = np.exp(cosines(A, candidates) / 0.5)[~np.eye(5, 9, dtype=bool)]
    value = losses.crd_log_constant(*tensors([A, candidates]), temperature=0.5)
    assert value.item() == pytest.approx(math.log(ratios.mean()), rel=1e-12)
    assert not value.requires_grad


# HSIC


def test_hsic_by_hand():
    """Of two rows: K = [[1, k], [k, 1]], H K H = (1 - k)/2·[[1, -1], [-1, 1]], so that HSIC = (1 - k)(1 - l)."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0, 0.0], [3.0, 2.0]])
    expected = (1 - math.exp(-0.5 * 1**2)) * (1 - math.exp(-0.5 * 2**2))
    assert losses.hsic(x, y, gamma=0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.02, 0.1, 1.0])
def test_hsic_is_the_estimate_of_the_published_code(gamma):
    value = losses.hsic(*tensors([A, WIDE]), gamma=gamma).item()
    assert value == pytest.approx(hsic_of_three_terms(A, WIDE, gamma), rel=1e-10)


def test_hsic_of_independent_samples_is_near_0():
    generator = torch.Generator().manual_seed(0)
    values, means = {}, {}
    for n in (50, 400):
        draws = [[torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in "xy"] for _ in range(40)]
        values[n] = np.mean([losses.hsic(x, y, gamma=0.5).item() for x, y in draws])
        kernels = [[off_diagonal(rbf(sample.numpy(), 0.5)).mean() for sample in draw] for draw in draws[:5]]
        means[n] = np.mean([(1 - mean_k) * (1 - mean_l) / n for mean_k, mean_l in kernels])
    x = draws[0][0]
    assert values[50] == pytest.approx(means[50], rel=0.1)
    assert values[400] == pytest.approx(means[400], rel=0.1)
    assert values[400] < 0.1 * losses.hsic(x, x**2, gamma=0.5).item()  # uncorrelated, but dependent
    assert losses.hsic(x, torch.ones(400, 3), gamma=0.5).item() == pytest.approx(0, abs=1e-12)


def test_hsic_of_distant_vectors_is_exact_far_from_the_origin():
    x = torch.tensor(A, dtype=torch.float32)
    near, far = (losses.hsic(shifted, x, gamma=0.1).item() for shifted in (x, x + 1000))
    assert far == pytest.approx(near, rel=1e-3)  # 6e-5 is all that float32 tells apart there


def test_hsic_of_very_distant_vectors_has_no_gradient():
    x = (1e3 * torch.tensor(A, dtype=torch.float32)).requires_grad_()
    value = losses.hsic(x, x, gamma=1.0)
    value.backward()
    assert value.item() == pytest.approx(1 / 4)
    assert x.grad.abs().max() == 0


# Matryoshka


def test_matryoshka_is_the_weighted_sum():
    a, b = tensors([A, B])
    value = losses.matryoshka(losses.info_nce, [a, b], widths=(6, 4, 2), weights=(1, 0.5, 0.25))
    parts = [info_nce_of(A[:, :w], B[:, :w]) for w in (6, 4, 2)]
    assert value.item() == pytest.approx(parts[0] + 0.5 * parts[1] + 0.25 * parts[2], rel=1e-12)
    assert torch.autograd.gradcheck(lambda *x: losses.matryoshka(losses.info_nce, x, (6, 4, 2)), (a, b))


def info_nce_of(a, b):
    return -np.diag(log_softmax(cosines(a, b) / 0.05, axis=1)).mean()


# What makes no sense

ONE, TWO = torch.ones(1, 4), torch.eye(2, 4)
BAD = {
    "one query, no negatives": (lambda: losses.info_nce(ONE, ONE), "at least two rows"),
    "one query, symmetric": (lambda: losses.info_nce(ONE, ONE, TWO, symmetric=True), "at least two rows"),
    "one text twice": (lambda: losses.simcse_unsupervised(ONE, ONE), "at least two rows"),
    "rows differ": (lambda: losses.info_nce(TWO, ONE), "as many rows in queries as in positives, got 2 and 1"),
    "widths differ": (lambda: losses.info_nce(TWO, torch.eye(2, 3)), "of one width, got 4 and 3"),
    "width of negatives": (lambda: losses.info_nce(TWO, TWO, torch.eye(2, 3)), r"negatives .* width 4, got .*2, 3"),
    "no matrix": (lambda: losses.info_nce(torch.ones(4), torch.ones(4)), r"queries to be vectors \[n, C\]"),
    "no rows": (lambda: losses.mse(torch.ones(0, 4), torch.ones(0, 4)), r"student to be vectors \[n, C\]"),
    "temperature 0": (lambda: losses.info_nce(TWO, TWO, temperature=0), "temperature must be positive, got 0"),
    "temperature nan": (lambda: losses.similarity_kl(TWO, TWO, temperature=math.nan), "temperature must be positive"),
    "temperature below 0": (lambda: losses.cosent(TWO, TWO, torch.ones(2), -0.1), "temperature must be positive"),
    "stretch 0": (lambda: losses.similarity_kl(TWO, TWO, stretch=0.0), "stretch must be positive, got 0"),
    "stretch nan": (lambda: losses.similarity_squared_error(TWO, TWO, math.nan), "stretch must be positive"),
    "crd temperature": (lambda: losses.crd(TWO, TWO, temperature=0.0), "temperature must be positive"),
    "one passage": (lambda: losses.ranking(ONE, ONE), "at least two passages"),
    "uneven passages": (lambda: losses.ranking(TWO, torch.eye(3, 4)), "equally many for each of 2 queries, got 3"),
    "teacher's width": (lambda: losses.mse(TWO, torch.eye(2, 3)), "student and teacher of one width, got 4 and 3"),
    "teacher's rows": (lambda: losses.similarity_kl(TWO, ONE), "as many rows in student as in teacher, got 2 and 1"),
    "one similarity": (lambda: losses.similarity_squared_error(ONE, ONE), "at least 2 rows"),
    "one to compare": (lambda: losses.similarity_kl(ONE, ONE), "at least 2 rows"),
    "hsic of one": (lambda: losses.hsic(ONE, ONE), "at least 2 rows"),
    "hsic gamma": (lambda: losses.hsic(TWO, TWO, gamma=0), "gamma must be positive, got 0"),
    "crd of one": (lambda: losses.crd(ONE, ONE), "at least two, got 1"),
    "crd without positives": (lambda: losses.crd(TWO.repeat(2, 1), TWO), "4 candidates or more"),
    "scores 0 to 5": (lambda: losses.cosine_regression(TWO, TWO, torch.tensor([0.0, 5])), "from -1 to 1, got 0 to 5"),
    "nan score": (lambda: losses.cosine_regression(TWO, TWO, torch.tensor([0.0, math.nan])), "from -1 to 1"),
    "scores missing": (lambda: losses.cosent(TWO, TWO, torch.ones(1)), "a score for each of 2 pairs"),
    "one pair": (lambda: losses.cosent(ONE, ONE, torch.ones(1)), "at least two pairs"),
    "too wide": (lambda: losses.matryoshka(losses.mse, [TWO, TWO], (8, 4)), "widths of 1 to 4"),
    "width 0": (lambda: losses.matryoshka(losses.mse, [TWO, TWO], (4, 0)), "widths of 1 to 4"),
    "no widths": (lambda: losses.matryoshka(losses.mse, [TWO, TWO], ()), "widths of 1 to 4"),
    "weights": (lambda: losses.matryoshka(losses.mse, [TWO, TWO], (4, 2), (1.0,)), "as many weights"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equal_scores_give_cosent_nothing_to_order():
    assert losses.cosent(*tensors([A, B]), torch.ones(5)).item() == 0
