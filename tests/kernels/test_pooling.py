"""Pooling and L2 normalisation: forward and every gradient against float64."""

import math
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm.kernels import pooling as pooling_kernels
from minilm.kernels.pooling import POOLINGS, pool

NAMES = "out d_x d_x2"
LENGTHS = [1, 2, 15, 16, 17, 127, 128, 129, 512]
SHORT = [3, 1, 18, 2]

each_pooling = pytest.mark.parametrize("pooling", POOLINGS)
one_or_two = pytest.mark.parametrize("tensors", [1, 2], ids=["one tensor", "mean of two"])


def formula(lengths, pooling, normalize, x, x2=None):
    """Plain torch, sequence by sequence; float32 from the pooled vector on, as the encoder does."""
    x = x if x2 is None else (x + x2) / 2
    reduce = {
        "mean": lambda rows: rows.mean(0),
        "cls": lambda rows: rows[0],
        "max": lambda rows: rows.amax(0),
        "mean_sqrt_len": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    }[pooling]
    pooled = torch.stack([reduce(rows) for rows in x.split(lengths)])
    pooled = pooled if x.dtype == torch.float64 else pooled.float()
    return F.normalize(pooled, dim=-1) if normalize else pooled


def starts(lengths, device):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def ours(lengths, pooling, normalize, x, x2=None):
    return pool(x, starts(lengths, x.device), pooling, normalize, x2)


def outcome(function, given, upstream):
    """The output, and the gradient of every token tensor."""
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given)
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]


def operands(lengths, width, dtype, device, tensors=1):
    torch.manual_seed(sum(lengths) + width)
    given = [torch.randn(sum(lengths), width).to(device, dtype) for _ in range(tensors)]
    return given, torch.randn(len(lengths), width, device=device)


def check(judge, lengths, pooling, normalize, given, upstream):
    exact = outcome(partial(formula, lengths, pooling, normalize), [x.double() for x in given], upstream)
    plain = outcome(partial(formula, lengths, pooling, normalize), given, upstream)
    mine = outcome(partial(ours, lengths, pooling, normalize), given, upstream)
    judge(mine, plain, exact, " ".join(NAMES.split()[: 1 + len(given)]))


@each_pooling
@pytest.mark.parametrize(
    ("tensors", "normalize"), [(1, False), (1, True), (2, True)], ids=["raw", "normalized", "mean of two, normalized"]
)
def test_ragged_batch(pooling, tensors, normalize, dtype, device, judge):
    given, upstream = operands(LENGTHS, 384, dtype, device, tensors)
    check(judge, LENGTHS, pooling, normalize, given, upstream)


@each_pooling
@one_or_two
def test_bfloat16(pooling, tensors, device, judge):
    """Interpreted rightly where no `tl.dot` is."""
    check(judge, SHORT, pooling, False, *operands(SHORT, 384, torch.bfloat16, device, tensors))


@each_pooling
@pytest.mark.parametrize("width", [64, 320, 1024])
def test_other_widths(pooling, width, dtype, device, judge):
    check(judge, SHORT, pooling, True, *operands(SHORT, width, dtype, device))


@each_pooling
@pytest.mark.parametrize("length", LENGTHS)
def test_one_sequence(pooling, length, dtype, device, judge):
    check(judge, [length], pooling, True, *operands([length], 64, dtype, device))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_300_sequences(pooling, dtype, device, judge):
    lengths = [1 + index * 7 % 23 for index in range(300)]
    check(judge, lengths, pooling, True, *operands(lengths, 64, dtype, device))


@each_pooling
def test_tensors_apart_in_memory(pooling, dtype, device, judge):
    given, upstream = operands(SHORT, 384, dtype, device, tensors=2)
    spaced = [torch.cat([x, x], dim=1)[:, :384] for x in given]
    assert not spaced[0].is_contiguous()
    check(judge, SHORT, pooling, True, spaced, torch.cat([upstream, upstream], dim=1)[:, :384])


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_equal_maxima_share_the_gradient(normalize, dtype, device, judge):
    """As torch.amax shares it, to the bit where nothing is normalised: within and across blocks of tokens."""
    (x,), upstream = operands([40, 3, 1, 70], 384, dtype, device)
    x = x.round()  # entries of -3 … 3: dozens of equal maxima
    upstream = upstream.to(dtype).float()
    check(judge, [40, 3, 1, 70], "max", normalize, [x], upstream)
    if not normalize:
        x[:, :100] = -torch.inf  # a column of them has a maximum too
        mine, plain = (outcome(partial(f, [40, 3, 1, 70], "max", False), [x], upstream) for f in (ours, formula))
        assert torch.equal(mine[0], plain[0])
        assert torch.equal(mine[1], plain[1])


def test_all_tokens_equal(dtype, device, judge):
    """Every token is a maximum of every column."""
    x = torch.full((129, 384), -2.0, dtype=dtype, device=device)
    check(judge, [128, 1], "max", True, [x], torch.randn(2, 384, device=device))


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@each_pooling
def test_entries_of_10000(pooling, sign, dtype, device):
    """Sums over 512 tokens that float16 could not hold."""
    x = torch.full((513, 384), sign * 1e4, dtype=dtype, device=device)
    value = sign * 1e4 * (math.sqrt(512) if pooling == "mean_sqrt_len" else 1)
    out = ours([512, 1], pooling, False, x)
    torch.testing.assert_close(out[0], torch.full_like(out[0], value), rtol=1e-6, atol=0)
    assert torch.equal(out[1], x[512].float())
    unit = ours([512, 1], pooling, True, x)
    torch.testing.assert_close(unit, torch.full_like(unit, sign / math.sqrt(384)), rtol=1e-6, atol=0)


@each_pooling
def test_zero_vectors(pooling, dtype, device):
    """Zeros, not 0 / 0; the gradient is torch's (1e12 times what comes) as far as the dtype goes, and finite."""
    lengths, bound = [3, 1], 1e-12 * torch.finfo(dtype).max
    x, upstream = torch.zeros(4, 384, dtype=dtype, device=device), torch.randn(2, 384, device=device)
    out, d_x = outcome(partial(ours, lengths, pooling, True), [x], upstream)
    _, exact = outcome(partial(formula, lengths, pooling, True), [x.float()], upstream.clamp(-bound, bound))
    assert not out.any()
    assert torch.isfinite(d_x).all()
    torch.testing.assert_close(d_x, exact.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_an_overflowing_gradient_shows(device):
    """Loss scaling looks for infinities: only a zero vector's gradient is kept finite."""
    x = torch.ones(3, 64, dtype=torch.float16, device=device)
    _, d_x = outcome(partial(ours, [3], "cls", True), [x], torch.randn(1, 64, device=device) * 1e9)
    assert d_x[0].isinf().all()


def test_vectors_shorter_than_the_clamp(device, judge):
    """Below 1e-12 a vector is divided by 1e-12, and its gradient is straight; just above, it is not."""
    (x,), upstream = operands([1, 1, 1], 384, torch.float32, device)
    x = F.normalize(x) * torch.tensor([[5e-13], [2e-12], [1.0]], device=device)
    for row in range(3):  # one at a time: their gradients are 1e12 apart
        check(judge, [1], "mean", True, [x[row : row + 1]], upstream[row : row + 1])


def test_a_nan_is_passed_on(device):
    """A maximum that hid it would give a vector that looks right."""
    x = torch.zeros(40, 64, device=device)
    x[20, 3] = torch.nan
    for pooling in ("max", "mean"):
        assert ours([40], pooling, False, x).isnan().nonzero().tolist() == [[0, 3]]


@each_pooling
def test_a_sequence_without_tokens_is_zero(pooling, dtype, device):
    """CUDA graphs fill up a batch with such sequences."""
    (x,), _ = operands([5], 64, dtype, device)
    for normalize in (False, True):
        out, d_x = outcome(partial(ours, [0, 5, 0, 0], pooling, normalize), [x], torch.ones(4, 64, device=device))
        assert not out[[0, 2, 3]].any()
        whole, d_whole = outcome(partial(ours, [5], pooling, normalize), [x], torch.ones(1, 64, device=device))
        assert torch.equal(out[1:2], whole)
        assert torch.equal(d_x, d_whole)


@each_pooling
def test_a_vector_does_not_depend_on_its_batch(pooling, dtype, device):
    """Batch-invariant to the bit, forward and backward."""
    lengths = [17, 1, 40, 129]
    (x,), upstream = operands(lengths, 384, dtype, device)
    out, d_x = outcome(partial(ours, lengths, pooling, True), [x], upstream)
    for index, rows in enumerate(x.split(lengths)):
        alone, d_alone = outcome(partial(ours, [len(rows)], pooling, True), [rows], upstream[index : index + 1])
        assert torch.equal(out[index], alone[0])
        assert torch.equal(d_x.split(lengths)[index], d_alone)


@each_pooling
@one_or_two
def test_reference_is_the_formula(pooling, tensors, dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    given, upstream = operands(SHORT, 64, dtype, device, tensors)
    given[0][:3] = given[-1][:3] = 0  # a zero vector, and ties
    x2 = given[1] if tensors == 2 else None
    for normalize in (False, True):
        upstream[0] = 1e-12 if normalize else 1.0
        exact = outcome(partial(formula, SHORT, pooling, normalize), [x.double() for x in given], upstream)
        plain = outcome(partial(formula, SHORT, pooling, normalize), given, upstream)
        bounds = starts(SHORT, device)
        out, norm = pooling_kernels.reference(given[0], bounds, pooling, normalize, x2)
        d_x = pooling_kernels.reference_backward(upstream, given[0], x2, bounds, out, norm, pooling, normalize)
        judge([out, *[d_x] * tensors], plain, exact, " ".join(NAMES.split()[: 1 + tensors]))


def test_operation_registers_fully(dtype, device):
    given, _ = operands(SHORT, 64, dtype, device, tensors=2)
    x, x2 = (x.requires_grad_() for x in given)
    bounds = starts(SHORT, device)
    opcheck(pooling_kernels._forward, (x, bounds, "mean", True, x2))
    opcheck(pooling_kernels._forward, (x, bounds, "max", False, None))


@one_or_two
def test_compiles_as_one_graph(tensors, dtype, device):
    given, upstream = operands(SHORT, 64, dtype, device, tensors)
    bounds = starts(SHORT, device)

    def pooled(x, x2=None):
        return pool(x, bounds, "mean", True, x2)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(*(outcome(f, given, upstream) for f in (compiled, pooled)), strict=True):
        assert torch.equal(mine, eager)


def test_wrong_operands_are_named(device):
    x, bounds = torch.zeros(3, 64, device=device), torch.tensor([0, 3], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, max, mean_sqrt_len; got 'avg'"):
        pool(x, bounds, "avg")
    with pytest.raises(ValueError, match=r"x2 \[T, C\].*x2 \[2, 64\]"):
        pool(x, bounds, "mean", x2=x[:2])
    with pytest.raises(ValueError, match=r"one dtype; got torch.float32 and torch.float16"):
        pool(x, bounds, "mean", x2=x.half())
