"""Attention over packed sequences: forward, cut both ways, and every gradient against float64."""

from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm.kernels import attention as module
from minilm.kernels import attention_backward
from minilm.kernels.attention import attention


@pytest.fixture(params=[False, True], ids=["by sequence", "by tiles of tokens"])
def token_tiles(request):
    return request.param


def formula(query, key, value, cu_seqlens):
    """Plain torch, one sequence at a time."""
    out = []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = (q * q.shape[2] ** -0.5) @ k.transpose(1, 2)  # scaled first, so that float16 holds logits of 1e4
        out.append((scores.softmax(dim=2) @ v).transpose(0, 1))
    return torch.cat(out)


def batch(lengths, device):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths, default=0)


def operands(lengths, dtype, device, heads=2, width=32):
    """Query, key and value as views of one packed tensor, and the gradient of the output."""
    torch.manual_seed(sum(lengths) + width)
    packed = torch.randn(sum(lengths), 3, heads, width).to(device, dtype)
    return packed.unbind(1), torch.randn(sum(lengths), heads, width).to(device, dtype)


def outcome(function, given, upstream=None):
    """The output and, if there is an upstream gradient, the gradient of every operand."""
    given = [x.detach().requires_grad_(upstream is not None) for x in given]
    out = function(*given)
    return (
        [out.detach()] if upstream is None else [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]
    )


def check(judge, lengths, given, upstream, token_tiles):
    cu_seqlens, max_seqlen = batch(lengths, given[0].device)
    plain = partial(formula, cu_seqlens=cu_seqlens)
    ours = partial(attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, token_tiles=token_tiles)
    exact = outcome(plain, [x.double() for x in given], upstream)
    names = "out" if upstream is None else "out d_query d_key d_value"
    judge(outcome(ours, given, upstream), outcome(plain, given, upstream), exact, names)


LENGTHS = {"one": [70], "short": [1, 2, 15, 16, 17, 1, 33], "up to 129": [127, 2, 128, 129, 1], "512": [512]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_out_and_gradients(lengths, token_tiles, dtype, device, judge):
    given, upstream = operands(lengths, dtype, device, heads=1 if max(lengths) > 128 else 2)
    backward_too = not token_tiles or max(lengths) < 512  # it doesn't depend on the way forward
    check(judge, lengths, given, upstream if backward_too else None, token_tiles)


def test_300_sequences(token_tiles, device, judge):
    lengths = [1 + (7 * i) % 13 for i in range(300)]
    check(judge, lengths, operands(lengths, torch.float16, device)[0], None, token_tiles)


def test_one_token_attends_to_itself(token_tiles, dtype, device):
    given, upstream = operands([1], dtype, device)
    out, d_query, d_key, d_value = outcome(lambda *x: attention(*x, *batch([1], device), token_tiles), given, upstream)
    assert torch.equal(out, given[2])
    torch.testing.assert_close(d_value, upstream, rtol=1e-6, atol=0)
    assert max(d_query.abs().max(), d_key.abs().max()) < 1e-6


@pytest.mark.parametrize("width", [1, 16, 24, 64, 80, 128])
def test_head_widths(width, token_tiles, dtype, device, judge):
    lengths = [20, 37]
    check(judge, lengths, *operands(lengths, dtype, device, heads=1, width=width), token_tiles)


def heads_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def columns_apart(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("lay_out", [heads_first, columns_apart])
def test_other_layouts(lay_out, token_tiles, dtype, device, judge):
    lengths = [3, 20]
    given, upstream = operands(lengths, dtype, device)
    check(judge, lengths, [lay_out(x) for x in given], lay_out(upstream), token_tiles)


def test_gradient_of_a_sum(dtype, device, judge):
    """Its gradient is one number, expanded: strides of 0."""
    given, _ = operands([3, 20], dtype, device)
    check(judge, [3, 20], given, torch.ones((), dtype=dtype, device=device).expand(23, 2, 32), False)


@pytest.mark.parametrize("length", [40, 150])
@pytest.mark.parametrize("above", [0.5, 0.0], ids=["half the keys at +1e4, half at -1e4", "all keys at -1e4"])
def test_logits_of_1e4(length, above, token_tiles, dtype, device, judge):
    """For every query alike; noise at right angles tells keys of one side apart."""
    (query, key, value), upstream = operands([length], dtype, device, heads=1)
    query, key = query.clone(), key.clone()
    sides = torch.where(torch.arange(length, device=device) < above * length, 42.0, -42.0)  # 42²·√32 = 9979
    for x, base in ((query, 42.0), (key, sides[:, None, None])):
        noise = (torch.randn(length, 1, 16, device=device) * 32).round() / 32
        x.copy_(torch.cat([base + noise, base - noise], dim=2))
    check(judge, [length], (query, key, value), upstream, token_tiles)


def test_one_key_far_above_the_rest(token_tiles, dtype, device, judge):
    """Logits up to ±1e4 and beyond: softmax picks one key, the rest underflow to 0."""
    (query, key, value), _ = operands([150], dtype, device, heads=1)
    given = (query * 60, key * 60, value)
    check(judge, [150], given, None, token_tiles)


def test_equal_scores_give_the_mean(token_tiles, dtype, device, judge):
    (query, key, value), upstream = operands([5, 150], dtype, device, heads=1)
    check(judge, [5, 150], (torch.zeros_like(query), key, value), upstream, token_tiles)


def test_log_of_the_sum(token_tiles, dtype, device):
    (query, key, value), _ = operands([3, 70], dtype, device)
    _, lse = module._forward(query, key, value, *batch([3, 70], device), token_tiles)
    for start, end in ((0, 3), (3, 73)):
        q, k = (x[start:end].transpose(0, 1).double() for x in (query, key))
        exact = (q @ k.transpose(1, 2) / 32**0.5).logsumexp(dim=2)
        torch.testing.assert_close(lse[:, start:end].double(), exact, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 17, 64, 130])
def test_a_sequence_is_the_same_to_the_bit_in_every_batch(length, dtype, device):
    alone, _ = operands([length], dtype, device, heads=1)
    others, _ = operands([3, 5, 140], dtype, device, heads=1)
    small, large = [x[:8] for x in others], [x[8:] for x in others]

    def among(before, after):
        lengths = [*before[0], length, *after[0]]
        given = [torch.cat([a, x, b]) for a, x, b in zip(before[1], alone, after[1], strict=True)]
        start = sum(before[0])
        return attention(*given, *batch(lengths, device))[start : start + length]

    nothing = [], [x[:0] for x in others]
    by_itself = among(nothing, nothing)
    for before, after in (
        (nothing, ([3, 5], small)),
        (([3, 5], small), nothing),
        (([3, 5], small), ([140], large)),
        (([140], large), ([8], small)),
    ):
        assert torch.equal(among(before, after), by_itself)


def test_a_higher_max_seqlen_changes_nothing(dtype, device):
    given, _ = operands([3, 20], dtype, device)
    cu_seqlens, _ = batch([3, 20], device)
    assert torch.equal(attention(*given, cu_seqlens, 20), attention(*given, cu_seqlens, 200))


def test_tokens_of_no_sequence_give_zeros(dtype, device):
    """A bucket of 200 tokens of which 73 are real, the rest whatever was there before."""
    given, upstream = operands([3, 70, 127], dtype, device)
    cu_seqlens, max_seqlen = batch([3, 70], device)
    real = outcome(lambda *x: attention(*x, cu_seqlens, max_seqlen, True), [x[:73] for x in given], upstream[:73])
    for x in given:
        x[73:] = float("nan")
    padded = torch.nn.functional.pad(cu_seqlens, (0, 4), value=73)  # four empty sequences
    for whole, part in zip(outcome(lambda *x: attention(*x, padded, 128, True), given, upstream), real, strict=True):
        assert torch.equal(whole[:73], part)
        assert not whole[73:].any()


@pytest.mark.parametrize("lengths", [[1], [3, 0, 0, 5, 0], [2] * 700, []], ids=["one", "empty ones", "700", "none"])
def test_where_each_token_belongs(lengths, device):
    cu_seqlens, _ = batch(lengths, device)
    expected = [[start, end] for start, end in pairwise(cu_seqlens.tolist()) for _ in range(start, end)]
    expected += [[sum(lengths)] * 2] * 9
    assert module.token_bounds(cu_seqlens, sum(lengths) + 9).T.tolist() == expected


def test_launches_write_into_views(dtype, device):
    """A whole encoder's operation gives its own memory, and wants no lse."""
    given, _ = operands([3, 20], dtype, device)
    cu_seqlens, max_seqlen = batch([3, 20], device)
    workspace = torch.full((23, 3, 2, 32), float("nan"), dtype=dtype, device=device)
    module.sequence_launch(*given, cu_seqlens, max_seqlen, workspace[:, 0])()
    module.tile_launch(*given, module.token_bounds(cu_seqlens, 23), workspace[:, 2])()
    assert torch.equal(workspace[:, 0], attention(*given, cu_seqlens, max_seqlen))
    assert torch.equal(workspace[:, 2], attention(*given, cu_seqlens, max_seqlen, token_tiles=True))
    assert workspace[:, 1].isnan().all()


def test_no_tokens(token_tiles, dtype, device):
    given, upstream = operands([], dtype, device)
    cu_seqlens, _ = batch([], device)
    for result in outcome(lambda *x: attention(*x, cu_seqlens, 0, token_tiles), given, upstream):
        assert result.shape == (0, 2, 32)


def test_reference_is_the_formula(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    lengths = [1, 20, 33]
    given, upstream = operands(lengths, dtype, device)
    cu_seqlens, max_seqlen = batch(lengths, device)
    plain = partial(formula, cu_seqlens=cu_seqlens)
    out, lse = module.reference(*given, cu_seqlens, max_seqlen, False)
    gradients = attention_backward.reference(upstream, *given, out, lse, cu_seqlens, max_seqlen, False)
    exact = outcome(plain, [x.double() for x in given], upstream)
    judge([out, *gradients], outcome(plain, given, upstream), exact, "out d_query d_key d_value")
    kernels = module.launch_forward(*given, cu_seqlens, max_seqlen, False)[1]
    torch.testing.assert_close(lse, kernels, atol=2e-6, rtol=1e-6)


def test_operation_registers_fully(token_tiles, dtype, device):
    given, _ = operands([3, 5], dtype, device)
    opcheck(module._forward, (*(x.detach().requires_grad_() for x in given), *batch([3, 5], device), token_tiles))


def test_compiles_as_one_graph(token_tiles, dtype, device):
    given, upstream = operands([3, 5], dtype, device)
    cu_seqlens, max_seqlen = batch([3, 5], device)

    def run(function):
        return outcome(lambda *x: function(*x, cu_seqlens, max_seqlen, token_tiles), given, upstream)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled), run(attention), strict=True):
        assert torch.equal(ours, eager)


def test_operands_that_do_not_fit_are_named(device):
    x = torch.zeros(3, 2, 32, device=device)
    cu_seqlens, _ = batch([3], device)
    with pytest.raises(ValueError, match=r"value \[T, H, D\].*value \[2, 2, 32\]"):
        attention(x, x, x[:2], cu_seqlens, 3)
    with pytest.raises(ValueError, match=r"one dtype.*float32, torch\.float32, torch\.float16"):
        attention(x, x, x.half(), cu_seqlens, 3)
    with pytest.raises(ValueError, match=r"cu_seqlens int32.*int64"):
        attention(x, x, x, cu_seqlens.long(), 3)
    wide = torch.zeros(3, 2, 129, device=device)
    with pytest.raises(ValueError, match="heads of 1 to 128 numbers, not 129"):
        attention(wide, wide, wide, cu_seqlens, 3)
