"""Attention statistics against patterns taken one by one, in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from minilm.internals import capture, patch
from minilm.internals.attention_statistics import attention_statistics


def test_averages_over_all_rows_of_all_texts(encoder, texts):
    texts = [*texts[:6], texts[0], ""]
    statistics = attention_statistics(encoder, texts)
    assert statistics.entropy.shape == (6, 12)
    patterns = capture(encoder, texts, "layers.*.attention.pattern")
    for layer, head in [(0, 0), (1, 8), (5, 11)]:
        found = {name: [] for name in ("entropy", "distance", "cls", "sep", "self", "previous", "next")}
        for pattern in patterns[f"layers.{layer}.attention.pattern"]:
            rows = pattern[head].double().numpy()
            for i, row in enumerate(rows):
                found["entropy"].append(entropy(row))
                found["distance"].append(sum(p * abs(i - j) for j, p in enumerate(row)))
                found["cls"].append(row[0])
                found["sep"].append(row[-1])
                found["self"].append(row[i])
                if i > 0:
                    found["previous"].append(row[i - 1])
                if i + 1 < len(row):
                    found["next"].append(row[i + 1])
        for name, values in found.items():
            ours = getattr(statistics, name if name in ("entropy", "distance") else f"to_{name}")
            assert ours[layer, head] == pytest.approx(np.mean(values), abs=1e-5), name


def test_known_patterns(encoder):
    with patch(encoder, "layers.2.attention.scores", 0.0):  # all look at all L = 6 tokens alike
        statistics = attention_statistics(encoder, "one two three four")
    np.testing.assert_allclose(statistics.entropy[2], np.log(6), atol=1e-6)
    np.testing.assert_allclose(statistics.distance[2], 35 / 18, atol=1e-6)  # the mean of |i - j| for 0 <= i, j < 6
    for name in ("to_cls", "to_sep", "to_self", "to_previous", "to_next"):
        np.testing.assert_allclose(getattr(statistics, name)[2], 1 / 6, atol=1e-6)
    with patch(encoder, "layers.4.attention.pattern", lambda p: torch.eye(p.shape[-1]).roll(1, 0), head=3):
        statistics = attention_statistics(encoder, "one two three four")
    assert statistics.to_previous[4, 3] == 1
    assert statistics.entropy[4, 3] == 0
    assert statistics.to_self[4, 3] == 0


def test_the_table_is_sorted_by_a_figure(encoder, texts):
    statistics = attention_statistics(encoder, texts[:4])
    lines = statistics.table("to_next").splitlines()
    assert len(lines) == 73
    assert lines[1].startswith(statistics.heads[int(statistics.to_next.argmax())])
    assert statistics.heads[17] == "layers.1.attention.heads.5"
    with pytest.raises(ValueError, match="entropy, distance"):
        statistics.table("to_moon")
