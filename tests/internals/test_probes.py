"""Probes that must succeed, probes that must fail, and a cross-validation written out."""

import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from minilm.internals.lens import layer_embeddings
from minilm.internals.probes import probe_texts, probe_tokens

COLOURS, ANIMALS = ("red", "blue", "green", "white", "black"), ("dog", "cat", "horse", "bird")


@pytest.fixture(scope="module")
def pets():
    """40 texts: five colours, four animals, two doings."""
    return [f"A {c} {a} {w}." for c in COLOURS for a in ANIMALS for w in ("is sleeping", "runs in the park")]


def test_what_is_there_is_found_and_what_is_not_is_not(encoder, pets):
    moving = ["runs" in text for text in pets]
    chance = np.random.default_rng(1).permutation(moving)
    found = probe_texts(encoder, pets, moving, ["embeddings", "layers.5.output"])
    assert found.points == ("embeddings", "layers.5.output")
    assert found.scores.shape == found.controls.shape == (2, 5)
    assert (found.scores.mean(axis=1) > 0.95).all()
    assert (found.selectivity > 0.3).all()
    assert found.baseline == 0.5
    nothing = probe_texts(encoder, pets, chance.tolist(), "layers.5.output")
    assert nothing.scores.mean() < 0.75
    assert abs(nothing.selectivity[0]) < 0.3


def test_folds_are_scored_on_what_they_have_not_seen(encoder, pets):
    animals = [text.split()[2] for text in pets]
    ours = probe_texts(encoder, pets, animals, "layers.1.output", folds=2, regularization=10, seed=3)
    rows = layer_embeddings(encoder, pets)["layers.1.output"].numpy().astype(np.float64)
    from sklearn.model_selection import StratifiedGroupKFold

    expected = []
    for train, test in StratifiedGroupKFold(2, shuffle=True, random_state=3).split(rows, animals, range(40)):
        mean, std = rows[train].mean(axis=0), rows[train].std(axis=0)
        model = LogisticRegression(C=0.1, max_iter=2000).fit((rows[train] - mean) / std, np.array(animals)[train])
        expected.append(np.mean(model.predict((rows[test] - mean) / std) == np.array(animals)[test]))
    assert ours.scores[0] == pytest.approx(expected)


def test_equal_texts_stay_together(encoder, own_sentences):
    """Random labels of texts that come twice could be learnt by heart from the other copy, were it in training."""
    once = own_sentences[:60]
    labels = np.random.default_rng(0).permutation([0, 1] * 30).tolist()
    twice = probe_texts(encoder, once * 2, labels * 2, "layers.5.output")
    assert twice.scores.mean() < 0.75
    assert twice.num_items == 120


def test_numbers_are_regressed(encoder, own_sentences):
    lengths = [float(len(text)) for text in own_sentences]
    found = probe_texts(encoder, own_sentences, lengths, "layers.0.output", regularization=100)
    assert found.baseline == 0
    assert found.scores.mean() > 0.4
    assert found.controls.mean() < 0.2


def test_tokens(encoder, own_sentences):
    """Early position can be read in the embeddings; the control gives a word one label, which can be read, too."""
    texts = own_sentences[:40]
    tokens = [encoder.tokenizer.tokens(encoder.tokenizer(text).ids) for text in texts]
    early = [[None, *(place < 4 for place in range(1, len(of_text) - 1)), None] for of_text in tokens]
    found = probe_tokens(encoder, texts, early, ["embeddings"], folds=3)
    assert found.num_items == sum(len(of_text) - 2 for of_text in tokens)
    assert found.scores.mean() > 0.85
    assert found.selectivity[0] > 0.05
    capital = [[place == 0 for place in range(len(of_text))] for of_text in tokens]
    assert probe_tokens(encoder, texts, capital, "layers.0.output", folds=3).scores.min() > 0.99


def test_rows_and_labels_belong_together(encoder, own_sentences):
    """Which word piece a token is can be read off its embedding without fault, through texts of several lengths."""
    texts = own_sentences[:40]
    ids = [encoder.tokenizer(text).ids for text in texts]
    frequent = encoder.tokenizer("the").ids[1]
    labels = [[piece == frequent for piece in of_text] for of_text in ids]
    found = probe_tokens(encoder, texts, labels, "embeddings.word", folds=3)
    assert found.scores.min() == 1


def test_the_control_gives_every_word_one_label(encoder, pets):
    """So that it can be read off the word alone, whatever the labels are."""
    lengths = [len(encoder.tokenizer(text)) for text in pets]
    labels = [[None, *np.random.default_rng(i).integers(0, 2, length - 2), None] for i, length in enumerate(lengths)]
    found = probe_tokens(encoder, pets, labels, "embeddings.word", folds=3)
    assert found.controls.min() == 1
    assert found.scores.mean() < 0.65


def test_results_repeat(encoder, pets):
    labels = [text[2] for text in pets]
    first, second = (probe_texts(encoder, pets, labels, "embedding", folds=3, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.controls, second.controls)
    assert "40 items, baseline" in first.table()


def test_bad_input(encoder, pets, monkeypatch):
    labels = ["runs" in text for text in pets]
    with pytest.raises(ValueError, match="one label a text, got 1 for 40"):
        probe_texts(encoder, pets, labels[:1])
    with pytest.raises(ValueError, match="at least 2 labels"):
        probe_texts(encoder, pets[:10], ["one"] * 10, "embedding")
    with pytest.raises(ValueError, match="the rarest in 1"):
        probe_texts(encoder, pets, [*labels[:-1], "other"], "embedding")
    with pytest.raises(ValueError, match="2 folds or more"):
        probe_texts(encoder, pets, labels, "embedding", folds=1)
    with pytest.raises(ValueError, match="regularization must be above 0"):
        probe_texts(encoder, pets, labels, "embedding", regularization=0)
    with pytest.raises(ValueError, match="text 1 has another number"):
        probe_tokens(encoder, ["a", "a"], [[0, 1, 0], [0, 1]])
    with pytest.raises(ValueError, match="no tokens to probe"):
        probe_tokens(encoder, ["a"], [[0, 1, 0]], "pooled")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"minilm\[probes\]"):
        probe_texts(encoder, pets, labels, "embedding")
