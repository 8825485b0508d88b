"""Cached gradients against one graph over the whole batch."""

import pytest
import torch
from torch import nn

from minilm.train import cached
from minilm.train.gradients import Gradients
from minilm.train.objectives import Contrastive
from minilm.train.settings import TrainingSettings


def gradients_of(encoder, objective, batch, **settings):
    """Return the loss and every gradient of a batch."""
    encoder.model.zero_grad()
    loss = Gradients(encoder, objective, TrainingSettings("unused", **settings)).add(batch, 0)
    return loss, {name: p.grad.clone() for name, p in encoder.model.named_parameters()}


def largest_difference(ours, theirs):
    """Return the largest difference between gradients, relative to the largest gradient."""
    scale = max(gradient.abs().max() for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / scale) for name in theirs)


@pytest.mark.parametrize("piece_tokens", [1, 20, 100])
def test_pieces_equal_the_full_batch(piece_tokens, tiny_encoder, make_rows):
    encoder, batch = tiny_encoder(dropout=0.0), next(iter(make_rows(batch_size=12, negatives=2)))
    whole_loss, whole = gradients_of(encoder, Contrastive(0.1), batch)
    loss, pieces = gradients_of(encoder, Contrastive(0.1), batch, piece_tokens=piece_tokens)
    assert float(abs(loss - whole_loss)) <= 1e-6
    difference = largest_difference(pieces, whole)
    print(f"cached gradients: {difference:.1e} (limit 1e-6)")
    assert difference <= 1e-6


class Net(nn.Module):
    """A map with dropout, whose forward passes are counted."""

    def __init__(self):
        super().__init__()
        self.map, self.drop, self.calls = nn.Linear(5, 3), nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return self.drop(self.map(x))


def test_dropout_is_replayed():
    """One graph over pieces encoded one after the other is the independent truth."""
    torch.manual_seed(0)
    net, scale = Net().double(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    pieces = torch.randn(4, 6, 5, dtype=torch.float64).unbind()

    def loss(vectors):
        return (scale * (vectors @ vectors.T).exp().sum(dim=1).log() * torch.rand(len(vectors))).mean()

    torch.manual_seed(1)
    expected = loss(torch.cat([net(piece) for piece in pieces]))
    expected.backward()
    after = torch.rand(1)
    truth = [p.grad.clone() for p in (*net.parameters(), scale)]
    net.zero_grad()
    scale.grad = None
    torch.manual_seed(1)
    value = cached.backward(net, pieces, loss)
    torch.testing.assert_close(value, expected.detach())
    for parameter, gradient in zip((*net.parameters(), scale), truth, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert torch.equal(torch.rand(1), after)  # random numbers go on as if nothing had been replayed
    assert net.calls == 4 + 8


def test_only_one_piece_has_a_graph_at_a_time():
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # noqa: ARG004
            alive.append(-1)
            return gradient

    weight = nn.Parameter(torch.ones(3))

    def encode(x):
        if torch.is_grad_enabled():
            alive.append(1)
        return Watched.apply(x * weight)

    cached.backward(encode, torch.ones(5, 2, 3).unbind(), lambda vectors: vectors.square().sum())
    assert alive == [1, -1] * 5


@pytest.mark.parametrize("piece_tokens", [0, 20])
def test_bfloat16_reaches_every_parameter(piece_tokens, tiny_encoder, make_rows):
    """Autocast keeps copies of weights; those made without a graph would leave parameters without a gradient."""
    encoder, batch = tiny_encoder(dropout=0.0), next(iter(make_rows(batch_size=12, negatives=2)))
    _, exact = gradients_of(encoder, Contrastive(0.1), batch)
    _, rough = gradients_of(encoder, Contrastive(0.1), batch, precision="bfloat16", piece_tokens=piece_tokens)
    assert 1e-6 < largest_difference(rough, exact) < 0.1
