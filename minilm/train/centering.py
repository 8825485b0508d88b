"""Moving a model's vectors so that their mean is 0, and the cosines of unrelated texts with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minilm.encoder import SentenceEncoder
from minilm.train.states import StatePooler


@torch.no_grad()
def center(encoder: SentenceEncoder, texts: Sequence[str]) -> None:
    """Subtract from every vector, before it is normalised, the mean over some texts; in place.

    The mean μ is taken off the bias of the last layer's LayerNorm, and so off each token's vector and what is pooled of
    them; nothing is added to the model. Those trained with a low temperature need it (gte, e5): their vectors share one
    direction, and the cosines of any two texts are about 0.7 or more.

    Source: Mu and Viswanath 2018 (arXiv 1702.01417), the first of its two steps.

    Args:
        encoder: the model, whose pooling is mean, cls or max, without an output layer.
        texts: at least one; some thousands of the kind to be embedded.

    Raises:
        ValueError: no texts, or a model of another kind.
    """
    if not texts:
        raise ValueError("expected texts to take the mean over, got none")
    pooling, output_layer = encoder.encoding.pooling, encoder.model.output_layer
    if pooling not in ("mean", "cls", "max") or output_layer is not None:
        raise ValueError(
            f"expected a model of mean, cls or max pooling without an output layer, got {pooling} pooling "
            f"{'with' if output_layer is not None else 'without'} one"
        )
    mean = StatePooler(encoder, ("unnormalized",)).encode(texts)[:, 0].mean(dim=0)
    bias = encoder.model.layers[-1].feed_forward_norm.bias
    bias.sub_(mean.to(bias))
