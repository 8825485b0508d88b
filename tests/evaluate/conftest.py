"""What the tests of evaluators share."""

import numpy as np
import pytest


class AngleEncoder:
    """Encodes the text "30 anything" as a vector of length 3 at 30 degrees, so that similarities are known."""

    def __init__(self):
        self.seen = []

    def encode(self, sentences):
        self.seen.extend(sentences)
        angles = np.radians([float(text.split()[0]) for text in sentences])
        return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def angle_encoder():
    return AngleEncoder()


@pytest.fixture
def lines(tmp_path):
    """Return a function that writes lines of columns to a file and returns its path."""

    def write(*rows, name="data.tsv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
