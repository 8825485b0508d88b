"""The order of a run: every row in its turn, by weight, apart from its like, and the same after any interruption."""

from collections import Counter

import numpy as np
import pytest
import torch

from minilm.train import distributed
from minilm.train.batches import Batches
from minilm.train.data import Draw, Source, make_table
from minilm.train.mixtures import Mixture
from minilm.train.rows import DataError


def table(name, texts, **settings):
    """A source of texts."""
    return make_table([{"text": text} for text in texts], Source(name, {"text": "text"}, **settings))


def numbered(name, count, **settings):
    return table(name, [f"{name}{i}" for i in range(count)], **settings)


def mixture(*tables):
    return Mixture.of(tables)


def captions(images=7, each=4, **settings):
    """Captions such as "3c1" in groups, drawn in pairs."""
    rows = [{"image": f"{i}", "captions": f"{i}c{j}"} for j in range(each) for i in range(images)]
    columns = {"image": "label", "captions": "text"}
    draw = (Draw("captions", ("query", "positive")),)
    return make_table(rows, Source("captions", columns, group_by="image", draw=draw, **settings))


def epoch(batches, column="text"):
    return [batch.texts[column] for batch in batches]


def flat(batches, column="text"):
    return [text for texts in epoch(batches, column) for text in texts]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    batches = Batches(mixture(numbered("a", 10), numbered("b", 7)), 4, columns=["text"], smallest=1)
    expected = {f"a{i}" for i in range(10)} | {f"b{i}" for i in range(7)}
    orders = [flat(batches) for _ in range(3)]
    assert all(len(order) == 17 and set(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert any(len({text[0] for text in texts}) == 2 for texts in epoch(batches))  # sources share batches


def test_the_order_is_the_seeds():
    data = mixture(numbered("a", 30))
    first, same, other = (Batches(data, 5, columns=["text"], seed=seed) for seed in (1, 1, 2))
    assert epoch(first) == epoch(same)
    assert epoch(first) == epoch(same)  # of the next epoch
    assert epoch(Batches(data, 5, columns=["text"], seed=1)) != epoch(other)


def test_the_rows_of_a_batch_can_be_found():
    data = mixture(numbered("a", 4), numbered("b", 5))
    for batch in Batches(data, 4, columns=["text"], drop_last=True):
        assert batch.total == len(batch.rows) == 4
        for row, text in zip(batch.rows, batch.texts["text"], strict=True):
            assert data.where(row) == f"{text[0]}, line {int(text[1:]) + 1}"


@pytest.mark.parametrize("options", [{}, {"by_source": True}, {"drop_last": True}], ids=str)
def test_resumed_anywhere_it_goes_on_to_the_bit(options):
    def run():
        data = mixture(captions(9, distinct=["image"], weight=2.0), captions(4, 3, weight=1))
        return Batches(data, 4, columns=["query", "positive"], rows_per_epoch=11, seed=3, on_bad_row="skip", **options)

    through, states, seen = run(), [], []
    states.append(through.state_dict())
    for _ in range(3):
        for batch in through:
            seen.append((batch.texts, batch.rows.tolist()))
            states.append(through.state_dict())
    assert len(seen) >= 6
    for done, state in enumerate(states):
        resumed, rest = run(), []
        resumed.load_state_dict(state)
        while len(rest) < len(seen) - done:
            rest += [(batch.texts, batch.rows.tolist()) for batch in resumed]
        assert rest[: len(seen) - done] == seen[done:]


def test_a_state_of_another_order_is_refused():
    data = mixture(numbered("a", 30))
    state = Batches(data, 5, columns=["text"]).state_dict()
    others = {
        "seed 0, not 1": Batches(data, 5, columns=["text"], seed=1),
        "batch_size 5, not 6": Batches(data, 6, columns=["text"]),
        "data": Batches(mixture(numbered("a", 32)), 5, columns=["text"]),
        "data .*": Batches(mixture(numbered("b", 30)), 5, columns=["text"]),
    }
    for message, batches in others.items():
        with pytest.raises(DataError, match=f"another order of batches: {message}"):
            batches.load_state_dict(state)


def test_weights_set_the_shares_and_each_source_goes_at_its_own_pace():
    data = mixture(numbered("a", 12, weight=1), numbered("b", 5, weight=2.5), numbered("c", 90, weight=0.5))
    batches = Batches(data, 4, columns=["text"], rows_per_epoch=16)
    epochs = [flat(batches) for _ in range(6)]
    for texts in epochs:
        assert Counter(text[0] for text in texts) == {"a": 4, "b": 10, "c": 2}
    counts = Counter(text for texts in epochs for text in texts)
    assert {counts[f"a{i}"] for i in range(12)} == {2}  # 6 epochs x 4 = 2 x all 12
    assert {counts[f"b{i}"] for i in range(5)} == {12}
    assert {counts[f"c{i}"] for i in range(90)} == {0, 1}
    assert len({text for texts in epochs[:3] for text in texts if text[0] == "a"}) == 12  # none again before all


def test_one_source_with_weights_by_label():
    rows = [{"text": f"{'xyz'[i % 3]}{i}", "origin": "xyz"[i % 3]} for i in range(30)]
    columns = {"text": "text", "origin": "label"}
    source = Source("rows", columns, weigh_by="origin", weight={"x": 3, "z": 1})
    data = mixture(make_table(rows, source))
    assert Counter(text[0] for text in flat(Batches(data, 4, columns=["text"]))) == {"x": 15, "z": 5}
    sources = epoch(Batches(data, 5, columns=["text"], by_source=True))
    assert sorted(texts[0][0] for texts in sources) == ["x", "x", "x", "z"]
    with pytest.raises(DataError, match="no row with origin w, given a weight"):
        mixture(make_table(rows, Source("rows", columns, weigh_by="origin", weight={"x": 3, "w": 1})))


def test_batches_by_source_are_of_one_source_and_shuffled():
    batches = Batches(mixture(numbered("a", 20), numbered("b", 12)), 4, columns=["text"], by_source=True)
    orders = ["".join(texts[0][0] for texts in epoch(batches)) for _ in range(4)]
    assert all(sorted(order) == list("aaaaabbb") for order in orders)
    assert len(set(orders)) > 1
    assert all(len({text[0] for text in texts}) == 1 for texts in epoch(batches))


def test_a_sample_has_the_shares_and_no_row_twice():
    data = mixture(numbered("a", 40, weight=3), numbered("b", 5, weight=1))
    for count, expected in ((12, {"a": 9, "b": 3}), (40, {"a": 30, "b": 5})):
        sample = data.sample(count, seed=1)
        texts = [text for _, text in sample.texts()]
        assert Counter(text[0] for text in texts) == expected
        assert len(set(texts)) == len(texts)
    assert Counter(flat(Batches(sample, 7, columns=["text"]))) == Counter(texts)  # each once, whatever the weights
    assert {text for _, text in data.sample(12, seed=1).texts()} <= set(texts)
    assert {text for _, text in data.sample(12, seed=2).texts()} - {text for _, text in data.sample(12, seed=1).texts()}


def test_some_weights_or_no_rows_are_refused():
    with pytest.raises(DataError, match="a weight for all of them or none"):
        mixture(numbered("a", 3, weight=1), numbered("b", 3))
    with pytest.raises(DataError, match="sources with rows"):
        Mixture([])


# Captions of one image, and whatever else must not meet.


def test_groups_never_meet_and_pairs_are_of_one_group():
    batches = Batches(
        mixture(captions(distinct=["image"], weight=1)), 5, columns=["query", "positive"], rows_per_epoch=40
    )
    pairs = Counter()
    for _ in range(5):
        for batch in batches:
            queries, positives = batch.texts["query"], batch.texts["positive"]
            assert len({query[0] for query in queries}) == len(queries)
            assert all(q[0] == p[0] and q != p for q, p in zip(queries, positives, strict=True))
            pairs.update(zip(queries, positives, strict=True))
    assert len(pairs) > 60  # of 7 x 4 x 3


def test_without_distinct_groups_do_meet():
    batches = Batches(mixture(captions(weight=1)), 5, columns=["query"], rows_per_epoch=40)
    assert any(len({query[0] for query in batch.texts["query"]}) < 5 for batch in batches)


def test_distinct_texts_across_sources():
    shared = [f"t{i}" for i in range(20)]
    data = mixture(table("a", shared, distinct=["text"]), table("b", shared, distinct=["text"]), numbered("c", 20))
    batches = Batches(data, 6, columns=["text"])
    for _ in range(3):
        texts = epoch(batches)
        assert all(len(set(batch)) == len(batch) for batch in texts)
        assert sum(map(len, texts)) == 60


def test_rows_that_fit_nowhere_are_left_out_and_reported(caplog):
    data = mixture(table("a", ["same"] * 6 + ["x", "y", "z"], distinct=["text"]))
    texts = epoch(Batches(data, 3, columns=["text"], smallest=1))
    assert [batch.count("same") for batch in texts] == [1, 1, 1]
    assert "batches of epoch 0: no place for 3 of 9 rows" in caplog.text


# What a row gives.


def rows_with_lists(**settings):
    lists = {"one": ["p"], "few": ["n0", "n1"], "many": [f"m{i}" for i in range(6)]}
    rows = [{"query": name, "negatives": texts} for name, texts in lists.items()]
    return make_table(rows, Source("rows", {"query": "text", "negatives": "texts"}, **settings))


def test_negatives_are_drawn_without_repeats_where_there_are_enough():
    data = mixture(rows_with_lists(draw=[{"column": "negatives", "count": 4}]))
    batches, seen = Batches(data, 3, columns=["query", "negatives"]), set()
    for _ in range(20):
        (batch,) = batches
        drawn = dict(zip(batch.texts["query"], batch.texts["negatives"], strict=True))
        assert {len(texts) for texts in drawn.values()} == {4}
        assert drawn["one"] == ["p"] * 4
        assert set(drawn["few"]) <= {"n0", "n1"}
        assert len(set(drawn["many"])) == 4
        seen.add(tuple(drawn["many"]))
    assert len(seen) > 10


def test_lists_of_different_lengths_need_a_draw():
    with pytest.raises(DataError, match=r"rows: rows have different numbers of negatives; draw a count"):
        Batches(mixture(rows_with_lists()), 2, columns=["negatives"])


def test_scores_and_vectors():
    rows = [{"sentence1": f"{i}", "score": i / 4} for i in range(5)]
    data = mixture(make_table(rows, Source("rows", {"sentence1": "text", "score": "number"})))
    vectors = {"teacher": ("sentence1", lambda texts: np.array([[float(t), 1.0] for t in texts], np.float32))}
    batches = Batches(data, 5, columns=["sentence1"], targets=["score", "teacher"], vectors=vectors)
    (batch,) = batches
    expected = [float(text) for text in batch.texts["sentence1"]]
    assert batch.targets["score"].dtype == batch.targets["teacher"].dtype == torch.float32
    assert batch.targets["score"].tolist() == [value / 4 for value in expected]
    assert batch.targets["teacher"].tolist() == [[value, 1.0] for value in expected]


@pytest.mark.parametrize(
    ("columns", "targets", "message"),
    [
        (["text", "query"], [], r"a gives no query; it has text \(text\)"),
        (["text"], ["score"], "a gives no score"),
        (["text"], ["text"], "a gives no text"),
    ],
)
def test_a_source_that_lacks_a_column(columns, targets, message):
    with pytest.raises(DataError, match=message):
        Batches(mixture(numbered("a", 4)), 2, columns=columns, targets=targets)


# Batches that are too small, and shared ones.


def test_a_batch_of_one_row(caplog):
    data = mixture(numbered("a", 9))
    with pytest.raises(
        DataError, match=r"a, line \d: in a last batch of fewer rows than 2; choose another batch_size, or"
    ):
        Batches(data, 4, columns=["text"])
    skipping = Batches(data, 4, columns=["text"], on_bad_row="skip")
    assert len(skipping) == 2
    assert [len(texts) for texts in epoch(skipping)] == [4, 4]
    assert "batches of epoch 0: skipped 1 bad rows: 1 x in a last batch of fewer rows than 2 (first: a" in caplog.text
    assert [len(texts) for texts in epoch(Batches(data, 4, columns=["text"], smallest=1))] == [4, 4, 1]
    assert [len(texts) for texts in epoch(Batches(data, 4, columns=["text"], drop_last=True))] == [4, 4]


def test_no_batch_at_all():
    with pytest.raises(DataError, match="3 rows make no batch of 4"):
        Batches(mixture(numbered("a", 3)), 4, columns=["text"], drop_last=True)


@pytest.mark.parametrize("wrong", [{"batch_size": 1}, {"smallest": 0}, {"seed": -1}, {"rows_per_epoch": 0}], ids=str)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected 1 <= smallest <= batch_size"):
        Batches(mixture(numbered("a", 3)), **{"batch_size": 2, "columns": ["text"], **wrong})


def test_processes_share_each_batch(monkeypatch):
    def run(process, processes):
        monkeypatch.setattr(distributed, "rank", lambda: process)
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        return [
            (b.texts["query"], b.texts["positive"], b.total) for b in Batches(data, 5, columns=["query", "positive"])
        ]

    data = mixture(captions(12, distinct=["image"]))
    whole, shares = run(0, 1), [run(process, 2) for process in (0, 1)]
    for (queries, positives, total), first, second in zip(whole, *shares, strict=True):
        assert (first[0] + second[0], first[1] + second[1]) == (queries, positives)
        assert total == first[2] == second[2] == len(queries)
        assert abs(len(first[0]) - len(second[0])) <= 1
