"""Centered vectors are the old ones less their mean, for every text and not those alone that the mean is of."""

import numpy as np
import pytest
import torch

from minilm.train.centering import center
from minilm.train.states import StatePooler

TEXTS = ["a man eats bread", "the dog", "an old bird sees a stone", "some child likes the red ball"]
OTHERS = ["a woman finds water", "the cat"]


def unnormalized(encoder, texts):
    pooler = StatePooler(encoder, ("unnormalized",))
    (batch,), places = pooler.pack(texts)
    with torch.no_grad():
        return pooler(batch)[places, 0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_the_mean_is_taken_off_every_vector(tiny_encoder, pooling):
    encoder = tiny_encoder(dropout=0.0, pooling=pooling)
    before, others = unnormalized(encoder, TEXTS), unnormalized(encoder, OTHERS)
    mean = before.mean(axis=0)
    assert np.abs(mean).max() > 0.05
    center(encoder, TEXTS)
    np.testing.assert_allclose(unnormalized(encoder, TEXTS), before - mean, atol=2e-6)
    expected = (others - mean) / np.linalg.norm(others - mean, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(OTHERS), expected, atol=1e-6)


def test_what_was_packed_before_is_not_used_again(tiny_encoder):
    encoder = tiny_encoder(dropout=0.0)
    first = encoder.encode(TEXTS)
    center(encoder, TEXTS)
    again = encoder.encode(TEXTS)
    assert np.abs(first - again).max() > 0.01
    with encoder.model.use_backend("torch"):
        np.testing.assert_allclose(encoder.encode(TEXTS), again, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean_sqrt_len", "avg_top2", "avg_first_last"])
def test_poolings_that_a_constant_does_not_come_through(tiny_encoder, pooling):
    with pytest.raises(ValueError, match=rf"mean, cls or max pooling without an output layer, got {pooling} pooling"):
        center(tiny_encoder(pooling=pooling), TEXTS)


def test_an_output_layer_and_no_texts_are_errors(tiny_encoder):
    with pytest.raises(ValueError, match="expected texts to take the mean over, got none"):
        center(tiny_encoder(), [])
    encoder = tiny_encoder()
    encoder.model.output_layer = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(ValueError, match="got mean pooling with one"):
        center(encoder, TEXTS)
