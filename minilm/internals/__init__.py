"""Opening the model: look at every tensor, change it, explain a similarity.

One concept a file; what most people want is imported here. Pictures are in `minilm.internals.plots`, measures of any
matrix of vectors in `geometry`, worked examples in `studies`.
"""

from minilm.internals.attention_statistics import attention_statistics
from minilm.internals.attribution import attribute_similarity, attribute_text
from minilm.internals.captures import Activations, Captured, capture
from minilm.internals.causal import ablation_effects
from minilm.internals.decomposition import decompose, decompose_pair
from minilm.internals.lens import layer_cka, layer_embeddings, layer_geometry, layer_similarities, layer_sts
from minilm.internals.patches import ablate, patch
from minilm.internals.paths import cosine_to, patching_grid, path_effects
from minilm.internals.points import Point, UnknownPointError, points_of
from minilm.internals.probes import probe_texts, probe_tokens
from minilm.internals.report import explain

__all__ = [
    "Activations",
    "Captured",
    "Point",
    "UnknownPointError",
    "ablate",
    "ablation_effects",
    "attention_statistics",
    "attribute_similarity",
    "attribute_text",
    "capture",
    "cosine_to",
    "decompose",
    "decompose_pair",
    "explain",
    "layer_cka",
    "layer_embeddings",
    "layer_geometry",
    "layer_similarities",
    "layer_sts",
    "patch",
    "patching_grid",
    "path_effects",
    "points_of",
    "probe_texts",
    "probe_tokens",
]
