"""Opening the model: look at every activation, change it, explain a similarity.

One concept a file; what most people want is imported here.
"""

from minilm.internals.capture import Activations, Captured, capture
from minilm.internals.patch import ablate, patch
from minilm.internals.points import Point, UnknownPointError, points

__all__ = ["Activations", "Captured", "Point", "UnknownPointError", "ablate", "capture", "patch", "points"]
