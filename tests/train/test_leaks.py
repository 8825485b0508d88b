"""Planted evaluation sentences are found, and none is in what the shipped recipes train on."""

import os
import re
import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest

from minilm.evaluate.sts_data import TASKS
from minilm.train.data import Source, make_table
from minilm.train.leaks import Leak, evaluation_sentences, find_leaks, normalize_text, without_leaks
from minilm.train.mixtures import Mixture
from minilm.train.rows import DataError
from minilm.train.sources import MIXTURES


@pytest.mark.parametrize(
    "same",
    [
        ("A man is eating.", "a man is EATING", "  A  man\tis eating!?", "A man is eat\u00ading."),
        ("The café's Straße", "the cafe's strasse", "The cafe\u0301s STRASSE"),
        ("ﬁve waterfalls", "five water falls", "\uff26\uff29\uff36\uff25 water-falls"),
        ("x² is 10 %", "x2 is 10%"),
    ],
    ids=lambda same: same[0],
)
def test_what_normalisation_makes_equal(same):
    assert len({normalize_text(text) for text in same}) == 1


def test_what_it_keeps_apart():
    texts = [
        "A man is eating.",
        "A man was eating.",
        "A man eats.",
        "Men are eating",
        "1",
        "11",
        "日本",
        "日本人",
        "да",
    ]
    assert len({normalize_text(text) for text in texts} - {""}) == len(texts)


@pytest.fixture
def small_sts(tmp_path):
    """An STS folder with one pair a file, each sentence of its own."""
    for task in TASKS:
        (tmp_path / task).mkdir()
        for name in ("test", "dev", "train") if task in ("stsb", "sickr") else ("news", "forum"):
            (tmp_path / task / f"{name}.tsv").write_text(f"1\tThis is {task} {name}, first.\t...\n")
    return tmp_path


def test_which_sentences_are_evaluated(small_sts):
    expected = {f"thisis{task}{name}first": f"{task} test" for task in TASKS[:5] for name in ("news", "forum")}
    expected |= {f"thisis{task}{split}first": f"{task} {split}" for task in TASKS[5:] for split in ("test", "dev")}
    assert evaluation_sentences(small_sts) == expected


PAIRS = {"query": "text", "negatives": "texts"}
EVALUATION = {"amaniseating": "stsb test", "abirdflies": "sts12 test"}


def planted():
    rows = [
        {"query": "A woman eats.", "negatives": ["Nobody eats.", "..."]},
        {"query": "Nothing.", "negatives": ["Here.", "a MAN is... eating"]},
        {"query": "A bird flies", "negatives": ["A bird, flies!"]},
        {"query": "A bird flies high.", "negatives": ["No bird flies."]},
    ]
    return Mixture.of([make_table(rows, Source("rows", PAIRS))])


def test_planted_leaks_are_found_in_every_column():
    assert list(find_leaks(planted().texts(), EVALUATION)) == [
        Leak(1, "a MAN is... eating", "stsb test"),
        Leak(2, "A bird flies", "sts12 test"),
        Leak(2, "A bird, flies!", "sts12 test"),
    ]


def test_leaks_are_found_as_texts_come():
    def texts():
        yield 0, "a man is eating"
        raise AssertionError("read too far")

    assert next(find_leaks(texts(), EVALUATION)).row == 0


def test_leaks_are_named_or_dropped(caplog):
    with pytest.raises(DataError, match=r"3 training texts .* rows, line 2: 'a MAN is... eating' \(stsb test\).*drop"):
        without_leaks(planted(), EVALUATION)
    left = without_leaks(planted(), EVALUATION, "drop")
    assert {text for _, text in left.texts()} == {
        *("A woman eats.", "Nobody eats.", "..."),
        *("A bird flies high.", "No bird flies."),
    }
    assert [left.where(row) for row in range(len(left))] == ["rows, line 1", "rows, line 4"]
    assert "the rows that hold them are left out" in caplog.text
    clean = without_leaks(left, EVALUATION)
    assert clean is left
    with pytest.raises(ValueError, match="on_leak must be one of error, drop"):
        without_leaks(left, EVALUATION, "ignore")


@pytest.fixture(scope="module")
def training_folder(sts_folder):
    """The data of the shipped recipes, by default beside that of STS."""
    folder = Path(os.environ.get("MINILM_TRAINING_DATA") or sts_folder.parent / "train")
    if not folder.is_dir():
        pytest.skip("no training data: set MINILM_TRAINING_DATA to the folder that minilm.train.sources describes")
    return folder


@pytest.fixture(scope="module")
def evaluation(sts_folder):
    found = evaluation_sentences(sts_folder)
    assert 25_000 < len(found) < 30_000
    return found


def plain(text):
    """Normalise in a way of its own: letters, digits and the blanks between words, in lower case, without accents."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


SHIPPED = {**MIXTURES, "open-sentences": MIXTURES["open-sentences"][1:]}  # its first source is a part of "sentences"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_mixtures_hold_no_evaluation_sentence(name, training_folder, sts_folder, evaluation):
    whole = Mixture.read(SHIPPED[name], training_folder)
    mixture = without_leaks(whole, evaluation, "drop")
    judged = [path for task in TASKS for path in (sts_folder / task).glob("*.tsv") if path.stem != "train"]
    sentences = {
        plain(sentence)
        for path in judged
        for line in path.read_text(encoding="utf-8").split("\n")
        for sentence in line.split("\t")[1:]
    } - {""}
    assert len(sentences) > 25_000
    assert not {text for _, text in mixture.texts() if plain(text) in sentences}
    assert len(mixture) > 0.999 * len(whole)


def test_the_shipped_recipes_drop_leaks_from_these_mixtures():
    recipes = [file.read_text(encoding="utf-8") for file in (files("minilm.train") / "recipes").iterdir()]
    assert recipes
    for recipe in recipes:
        names = re.findall(r'^mixture = "(.*)"$', recipe, re.MULTILINE)
        assert len(names) == 1
        assert names[0] in MIXTURES
        assert '\non_leak = "drop"\n' in recipe
