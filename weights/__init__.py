"""Weights: reading, converting, checking, storing and exporting them; imported as `minilm.weights`."""
