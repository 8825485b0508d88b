"""Embeddings + LayerNorm: forward and every gradient against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm.kernels import embedding
from minilm.kernels.embedding import CHUNK, Lookup, embed

NAMES = "out d_word d_token_type d_position d_weight d_bias"
LENGTHS = [1, 2, 15, 16, 17, 127, 128, 129, 512]
EPS = 1e-12


def formula(ids, type_ids, positions, word, token_type, position, weight, bias, eps):
    x = F.embedding(ids, word) + F.embedding(type_ids, token_type) + F.embedding(positions, position)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def outcome(function, indices, parameters, upstream):
    """The output, and the gradient of every parameter."""
    parameters = [x.detach().requires_grad_() for x in parameters]
    out = function(*indices, *parameters, EPS)
    return [out.detach(), *torch.autograd.grad(out, parameters, upstream.to(out.dtype))]


def operands(lengths, width, dtype, device, words=40, spread=1.0):
    """Sequences of those lengths: [CLS] first, [SEP] last, a third of the tokens of the second type."""
    torch.manual_seed(sum(lengths) + width)
    tokens = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.randint(2, words - 3, (tokens,))  # some rows of the table are not used
    ids[positions == 0] = 0
    indices = [x.to(device) for x in (ids, (torch.arange(tokens) % 3 == 0).long(), positions)]
    tables = [torch.randn(rows, width) * spread for rows in (words, 2, max(lengths) + 1)]
    parameters = [x.to(device, dtype) for x in (*tables, torch.randn(width), torch.randn(width))]
    return indices, parameters, torch.randn(tokens, width).to(device, dtype)


def check(judge, indices, parameters, upstream):
    exact = outcome(formula, indices, [x.double() for x in parameters], upstream)
    plain = outcome(formula, indices, parameters, upstream)
    judge(outcome(embed, indices, parameters, upstream), plain, exact, NAMES)


def test_ragged_batch(dtype, device, judge):
    check(judge, *operands(LENGTHS, 64, dtype, device))


@pytest.mark.parametrize("width", [320, 384, 1024])
def test_other_widths(width, dtype, device, judge):
    check(judge, *operands([3, 18, 1], width, dtype, device))


def test_bfloat16(device, judge):
    """Interpreted rightly where no `tl.dot` is."""
    check(judge, *operands([3, 18, 1], 384, torch.bfloat16, device))


@pytest.mark.parametrize("length", [1, 2, 17, 128])
def test_one_sequence(length, dtype, device, judge):
    check(judge, *operands([length], 64, dtype, device))


def test_300_sequences(dtype, device, judge):
    check(judge, *operands([1 + index * 7 % 23 for index in range(300)], 64, dtype, device))


def test_tensors_apart_in_memory(dtype, device, judge):
    indices, parameters, upstream = operands([3, 18, 1], 384, dtype, device)
    indices = [torch.stack([x, x], dim=1)[:, 0] for x in indices]
    parameters = [torch.stack([x, x], dim=-1)[..., 0] for x in parameters]
    assert not any(x.is_contiguous() for x in (*indices, *parameters))
    check(judge, indices, parameters, torch.cat([upstream, upstream], dim=1)[:, :384])


def test_large_entries(dtype, device, judge):
    """Sums beyond float16's range: the kernel's are float32, so its truth is float64's, with nothing to spare."""
    indices, parameters, upstream = operands([3, 18, 1], 384, dtype, device, spread=1e4)
    parameters[0][0], parameters[1][:], parameters[2][:, :192] = 6e4, 6e4, -6e4
    exact = outcome(formula, indices, [x.double() for x in parameters], upstream)
    ours = outcome(embed, indices, parameters, upstream)
    judge(ours, [x.to(y.dtype) for x, y in zip(exact, ours, strict=True)], exact, NAMES)


def test_equal_entries_give_the_bias(dtype, device):
    """A row without variance: x̂ is 0, not a division by it."""
    indices, (*_, weight, bias), _ = operands([5], 384, dtype, device)
    tables = [torch.full((rows, 384), 0.5, dtype=dtype, device=device) for rows in (40, 2, 6)]
    assert torch.equal(embed(*indices, *tables, weight, bias, EPS), bias.expand(5, 384))


def test_added_in_berts_order(device):
    """(word + token type) + position in float32: 1 + 2^24 is 2^24, so the 1 is lost in this order only."""
    first = torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.zeros(3, 1, 64, device=device)
    rows[:, 0, 0] = torch.tensor([1.0, 2.0**24, -(2.0**24)])
    _, mean, _ = embedding._forward(first, first, first, *rows, torch.ones_like(rows[0, 0]), rows[0, 0], EPS)
    assert mean.item() == 0


@pytest.mark.parametrize("tokens", [CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_gradients_of_rows_that_many_tokens_share(tokens, device, judge):
    """Stretches of the sorted order that start, end, and lie, within and across chunks of it."""
    torch.manual_seed(tokens)
    d_sum = torch.randn(tokens, 64, device=device)
    for rows, first in ((1, 0), (2, 1), (5, 2)):  # one row; a row without tokens; several
        ids = torch.randint(first, rows, (tokens,), device=device)
        exact = torch.zeros(rows, 64, dtype=torch.float64, device=device).index_add_(0, ids, d_sum.double())
        ours = embedding.launch_table(d_sum, ids, torch.empty(rows, 64, device=device))
        judge(ours, exact.float(), exact, f"{rows}-rows")


def test_gradients_are_the_same_to_the_bit(dtype, device):
    given = operands([30] * 12, 64, dtype, device)
    first, second = (outcome(embed, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_its_batch(dtype, device):
    indices, parameters, _ = operands([17, 30], 384, dtype, device)
    whole = embed(*indices, *parameters, EPS)
    for token in (0, 18, 46):
        alone = embed(*(x[token : token + 1] for x in indices), *parameters, EPS)
        assert torch.equal(whole[token], alone[0])


def test_no_tokens(dtype, device):
    _, parameters, _ = operands([1], 384, dtype, device)
    indices = [torch.zeros(0, dtype=torch.int64, device=device)] * 3
    out, *gradients = outcome(embed, indices, parameters, torch.zeros(0, 384))
    assert out.shape == (0, 384)
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("which", range(3), ids=["ids", "type_ids", "positions"])
@pytest.mark.parametrize("bad", [-1, 1 << 40], ids=["negative", "beyond the table"])
class TestIdsOutsideTheirTable:
    def test_are_an_error_on_the_cpu(self, which, bad, dtype):
        indices, parameters, _ = operands([5], 64, dtype, "cpu")
        indices[which][3] = bad
        with pytest.raises(IndexError):
            embed(*indices, *parameters, EPS)
        with pytest.raises(IndexError):
            embedding.reference(*indices, *parameters, EPS)

    def test_are_not_read_by_the_kernel(self, which, bad, dtype, device):
        """As on a GPU, where nobody looks at them first: that row is NaN, the others are what they were."""
        indices, parameters, upstream = operands([9], 64, dtype, device)
        sound, *gradients = outcome(embed, indices, parameters, upstream)
        indices[which][3] = bad
        lookup = Lookup(*indices, *parameters[:3])
        out, mean, rstd = torch.empty_like(sound), torch.empty(9, device=device), torch.empty(9, device=device)
        embedding.forward_launch(lookup, *parameters[3:], EPS, out, mean, rstd)()
        others = torch.arange(9) != 3
        assert out[3].isnan().all()
        assert torch.equal(out[others], sound[others])
        d_tables = embedding.launch_backward(upstream, *lookup, parameters[3], mean, rstd)[:3]
        for table, (ours, exact) in enumerate(zip(d_tables, gradients, strict=False)):
            untouched = torch.ones(len(ours), dtype=torch.bool)
            untouched[indices[table][3].clamp(0, len(ours) - 1)] = False  # it shares the NaN, if the id is sound
            assert torch.equal(ours[untouched], exact[untouched]) or table == which


def test_reference_is_the_formula(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    indices, parameters, upstream = operands(LENGTHS, 64, dtype, device)
    exact = outcome(formula, indices, [x.double() for x in parameters], upstream)
    out, mean, rstd = embedding.reference(*indices, *parameters, EPS)
    gradients = embedding.reference_backward(upstream, *indices, *parameters[:4], mean, rstd)
    judge([out, *gradients], outcome(formula, indices, parameters, upstream), exact, NAMES)


def test_operation_registers_fully(dtype, device):
    indices, parameters, _ = operands([5], 64, dtype, device)
    opcheck(embedding._forward, (*indices, *(x.requires_grad_() for x in parameters), EPS))


def test_compiles_as_one_graph(dtype, device):
    given = operands([5, 2], 64, dtype, device)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(outcome(f, *given) for f in (compiled, embed)), strict=True):
        assert torch.equal(ours, eager)


def test_shapes_that_do_not_fit_are_named(device):
    indices, parameters, _ = operands([5], 64, torch.float32, device)
    with pytest.raises(ValueError, match=r"positions \[T\].*positions \[4\]"):
        embed(*indices[:2], indices[2][:4], *parameters, EPS)
