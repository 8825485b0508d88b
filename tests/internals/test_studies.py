"""The studies measure what they say, held against the plain way of measuring it."""

import pytest
import torch

from minilm.evaluate.correlation import spearman
from minilm.evaluate.sts_data import read_sts
from minilm.internals import ablate, patch
from minilm.internals.captures import capture
from minilm.internals.studies import heads, negation, word_order


def cosines(encoder, first, second):
    return encoder.similarity_pairwise(encoder.encode(first), encoder.encode(second))


def test_negation(encoder, monkeypatch):
    monkeypatch.setattr(negation, "SENTENCES", negation.SENTENCES[:3])
    result = negation.run(encoder, show_progress_bar=False)
    plain = ["The film was good.", "He is at home.", "The door is open."]
    negated = ["The film was not good.", "He is not at home.", "The door is not open."]
    varied = ["The film was very good.", "He is still at home.", "The door is also open."]
    expected = [cosines(encoder, plain, others).mean().item() for others in (negated, varied, [*plain[1:], plain[0]])]
    assert result.rows["layers.5.output"] == pytest.approx(expected, abs=1e-6)
    assert list(result.rows) == ["embeddings", *(f"layers.{layer}.output" for layer in range(6))]
    difference = float(result.findings[2].split(", ")[1])
    assert difference == pytest.approx(expected[0] - expected[1], abs=5.1e-5)
    assert result.table().startswith('What happens to "not"?\n')


def test_negation_components_add_up(encoder, monkeypatch):
    """What the picture shows is the difference of the two cosines, taken apart."""
    drawn = {}
    monkeypatch.setattr(negation, "SENTENCES", negation.SENTENCES[:2])
    monkeypatch.setattr(negation.plots, "components", lambda values, **_: drawn.update(values))
    result = negation.run(encoder, show_progress_bar=False)
    assert list(result.pictures()) == ["negation-layers", "negation-components"]
    with_not, with_other, _ = result.rows["layers.5.output"]
    assert len(drawn) == 106
    assert sum(drawn.values()) == pytest.approx(with_not - with_other, abs=1e-6)


def test_word_order(encoder, monkeypatch):
    monkeypatch.setattr(word_order, "EVENTS", word_order.EVENTS[:1])
    result = word_order.run(encoder, show_progress_bar=False)
    columns = dict(zip(result.columns, zip(*result.rows.values(), strict=True), strict=True))
    first, second = "The dog bites the man.", "The man bites the dog."
    assert columns["roles swapped"][-1] == pytest.approx(cosines(encoder, [first], [second]).item(), abs=1e-6)
    passive = cosines(encoder, [first], ["The man was bitten by the dog."]).item()
    assert columns["in the passive"][-1] == pytest.approx(passive, abs=1e-6)
    assert columns["no positions"] == pytest.approx([1.0] * 7, abs=1e-6)  # a bag of words, as theory has it
    assert columns["roles swapped"][0] == pytest.approx(1.0, abs=1e-3)
    ours, theirs = capture(encoder, [first, second], "layers.2.output")["layers.2.output"]
    assert columns["the word itself"][3] == pytest.approx(torch.cosine_similarity(ours[2], theirs[5], dim=0).item())
    assert columns["blind here"][0] == columns["roles swapped"][-1]  # before any layer, none is blind
    assert result.pictures().keys() == {"word-order-layers", "word-order-blind"}


def test_blind_attention_is_that_without_positions(encoder):
    vectors = []
    for text in ("The dog bites the man.", "The man bites the dog."):
        with ablate(encoder, "embeddings.position"):
            pattern = capture(encoder, text, "layers.3.attention.pattern")["layers.3.attention.pattern"][0]
        with patch(encoder, "layers.3.attention.pattern", pattern):
            vectors.append(encoder.encode(text))
    found = word_order._cosine_when_blind(encoder, ["The dog bites the man."], ["The man bites the dog."], 3)
    assert found == pytest.approx(float(encoder.similarity(*vectors)), abs=1e-6)


def test_words_that_are_not_one_piece_each(encoder, monkeypatch):
    monkeypatch.setattr(word_order, "EVENTS", (("axolotl", "bites", "man", "bitten"),))
    with pytest.raises(ValueError, match="single word pieces"):
        word_order.run(encoder, show_progress_bar=False)


def test_heads(encoder, sts_folder):
    result = heads.run(encoder, data=sts_folder, pairs=12, show_progress_bar=False)
    pairs = read_sts(sts_folder, ["stsb"], "dev")["stsb"]["dev"]
    chosen = torch.linspace(0, len(pairs) - 1, 12).long().tolist()
    first, second, gold = ([column[i] for i in chosen] for column in (pairs.first, pairs.second, pairs.scores))
    rows = list(result.rows)
    assert len(rows) == 2 * heads.MOST + 6
    head = rows[0]  # the one that is needed most
    _, layer, _, _, number = head.split(".")

    def score():
        return 100 * spearman(cosines(encoder, first, second).numpy().round(7), torch.tensor(gold).numpy())

    intact = score()
    with ablate(encoder, f"layers.{layer}.attention.head_outputs", "mean", source=[*first, *second], head=int(number)):
        assert result.rows[head][0] == pytest.approx(score() - intact, abs=0.5)  # a tie may fall another way
    assert result.rows[head][0] < 0
    assert f"{intact:.2f}" in result.findings[0]


def test_too_few_pairs(encoder, sts_folder):
    with pytest.raises(ValueError, match="at least four pairs, got 2"):
        heads.run(encoder, data=sts_folder, pairs=2)
