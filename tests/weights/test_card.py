"""Model cards: read by the Hugging Face hub's own client, true to what was measured, right in both libraries."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from minilm.evaluate.significance import with_intervals
from minilm.evaluate.sts import STSResult, STSScore
from minilm.evaluate.triplets import TripletResult
from minilm.weights.card import Facts, model_card
from minilm.weights.checkpoint import fingerprint
from minilm.weights.export import export_sentence_transformers
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint

FACTS = {
    "name": "tiny",
    "summary": 'A model of "tests": small.',
    "licence": "MIT",
    "language": "en",
    "base_model": ["owner/start", "owner/other: this"],
    "teachers": [{"name": "owner/teacher", "licence": "Apache-2.0", "url": "https://example.org/teacher"}],
    "data": [{"name": "Pairs | triplets", "licence": "CC-BY-4.0", "note": "a sample"}],
    "command": "minilm distill similarity \\\n  --set epochs=2\n",
    "use": "Tests.",
    "limits": ["Says nothing.", "Knows *no* words."],
}


@pytest.fixture
def checkpoint(bert_folder):
    return read_checkpoint(bert_folder())


def measured(checkpoint, result):
    """What `minilm eval MEASURE --json FILE` writes of a result, read again."""
    described = {"fingerprint": fingerprint(checkpoint), **checkpoint.encoding.to_dict()}
    return json.loads(json.dumps({"minilm": "0.1.0", "model": described, **result.to_dict()}))


@pytest.fixture(scope="module")
def sts():
    random = np.random.default_rng(0)
    tasks = [STSScore(name, random.random(50), random.random(50).round(1)) for name in ("sts12", "stsb")]
    return with_intervals(STSResult(tuple(tasks)), 100, 0)


def rows(card, title):
    """The rows below a table's header that begins with `title`, as lists of cells."""
    _, _, behind = card.partition(f"| {title} |")
    lines = behind.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_hub_reads_the_front_matter(checkpoint):
    data = ModelCard(model_card(checkpoint, Facts.from_dict(FACTS))).data.to_dict()
    assert data == {
        "language": "en",
        "license": "mit",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction"],
        "base_model": ["owner/start", "owner/other: this"],
    }


def test_facts_are_all_told(checkpoint):
    card = model_card(checkpoint, Facts.from_dict(FACTS))
    assert "\n# tiny\n\n" + FACTS["summary"] in card
    assert f"```sh\n{FACTS['command']}```" in card
    assert "\nTests.\n\n- Says nothing.\n- Knows *no* words.\n" in card
    assert "Started from owner/start, owner/other: this." in card
    teachers, data = card.split("Teachers:")[1].split("Training data:")
    assert rows(teachers, "name") == [["[owner/teacher](https://example.org/teacher)", "Apache-2.0", ""]]
    assert rows(data, "name") == [[r"Pairs \| triplets", "CC-BY-4.0", "a sample"]]


def test_without_facts_there_is_what_the_checkpoint_tells(checkpoint):
    checkpoint = replace(checkpoint, provenance={"source": "somewhere", "licence": "Apache-2.0", "step": 3})
    card = model_card(checkpoint)
    assert ModelCard(card).data.to_dict().keys() == {"license", "library_name", "pipeline_tag", "tags"}
    assert re.findall("^## (.*)", card, re.MULTILINE) == ["What it is", "Where its weights came from"]
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == checkpoint.provenance
    told = dict(rows(card, " | "))
    assert told["fingerprint"] == f"`{fingerprint(checkpoint)}`"
    assert told["licence"] == "Apache-2.0"
    assert told["vectors"] == "32 numbers, not scaled, compared by cosine"
    assert told["parameters"] == f"{sum(t.numel() for t in checkpoint.model_tensors.values()):,}"
    unknown = model_card(replace(checkpoint, provenance={}))
    assert "license" not in ModelCard(unknown).data.to_dict()
    assert dict(rows(unknown, " | "))["licence"] == "unknown"


def test_an_output_layer_is_told(checkpoint):
    tensors = {**checkpoint.tensors, "output_layer.weight": torch.ones(8, 32)}
    told = dict(rows(model_card(replace(checkpoint, tensors=tensors)), " | "))
    assert told["vectors"].startswith("8 numbers")
    assert told["pooling"] == "mean, then a linear map without bias"


def test_scores_are_those_measured(checkpoint, sts):
    card = model_card(checkpoint, scores=[measured(checkpoint, sts)])
    assert "`minilm eval sts`, test: 100 pairs. Spearman's rank correlation x 100" in card
    shown = rows(card, "sts")
    assert [row[0] for row in shown] == ["sts12", "stsb", "average"]
    for name, figure, interval in shown:
        low, high = map(float, interval.split(" to "))
        assert float(figure) == pytest.approx(sts.figures[name], rel=1e-3)
        assert low == pytest.approx(sts.intervals[name].low, rel=1e-3)
        assert high == pytest.approx(sts.intervals[name].high, rel=1e-3)


def test_figures_have_four_digits_or_none(checkpoint, sts):
    report = measured(checkpoint, sts)
    report["figures"] = {"a": 79.1, "b": None, "c": 0.12345}
    report["intervals"] = {"a": {"low": 78, "high": 80.006}, "b": {"low": None, "high": None}}
    assert rows(model_card(checkpoint, scores=[report]), "sts") == [
        ["a", "79.10", "78.00 to 80.01"],
        ["b", "-", "- to -"],
        ["c", "0.1235", ""],
    ]


def test_several_measures(checkpoint, sts):
    triplets = TripletResult(np.array([0.1, -0.1, 0.2]))
    card = model_card(checkpoint, scores=[measured(checkpoint, result) for result in (sts, triplets)])
    assert "`minilm eval triplets`: 3 triplets. Intervals by bootstrap." in card
    assert rows(card, "triplets")


def test_scores_of_another_model_are_refused(checkpoint, sts):
    report = measured(checkpoint.with_encoding(max_seq_length=20), sts)
    with pytest.raises(WeightsError, match=rf"expected sts scores of .*{fingerprint(checkpoint)[:16]}, got those of"):
        model_card(checkpoint, scores=[report])


@pytest.mark.parametrize("report", [{}, {"measure": "sts"}, {"models": {}}], ids=str)
def test_what_is_no_scores_is_refused(checkpoint, report):
    with pytest.raises(WeightsError, match="expected what `minilm eval MEASURE --json FILE` writes"):
        model_card(checkpoint, scores=[report])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "facts.toml: there is no entry 'titel'; there are name, summary, licence"),
        ({"name": 3}, "facts.toml: name must be a text, got 3"),
        ({"limits": "none"}, "facts.toml: limits must be a list of texts, got 'none'"),
        ({"base_model": [1]}, "base_model must be a list of texts"),
        ({"data": "x"}, "facts.toml: data must be a list of tables, got 'x'"),
        ({"data": [{"name": "x"}]}, "data: expected the texts name and licence, and if wanted url and note; got"),
        ({"teachers": [{"name": "x", "licence": "MIT", "link": "y"}]}, "teachers: expected the texts name and licence"),
        ({"teachers": [{"name": "x", "licence": 1}]}, "teachers: expected the texts name and licence"),
    ],
    ids=str,
)
def test_facts_that_cannot_be_told(changes, message):
    with pytest.raises(WeightsError, match=re.escape(message)):
        Facts.from_dict(FACTS | changes, "facts.toml")


def test_what_sentence_transformers_cannot_have_is_not_promised(checkpoint):
    card = model_card(checkpoint.with_encoding(pooling="avg_top2"))
    assert "sentence_transformers" not in card
    assert "library_name" not in ModelCard(card).data.to_dict()


def test_a_shipped_model_is_loaded_by_its_name(checkpoint, sources):
    assert 'minilm.load("path/to/this/folder")' in model_card(checkpoint, Facts("tiny"))
    checkpoint.save(sources.models / "tiny")
    card = model_card(checkpoint, Facts("tiny"))
    assert 'minilm.load("tiny")' in card
    assert "minilm weights export tiny FOLDER --to sentence-transformers" in card


def test_both_examples_run_and_agree(canonical_folder, tmp_path, capsys):
    folder = export_sentence_transformers(read_checkpoint(canonical_folder), tmp_path / "exported")
    ours, theirs = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    printed = []
    for code, placeholder in ((ours, "path/to/this/folder"), (theirs, "FOLDER")):
        assert f'"{placeholder}"' in code
        exec(compile(code.replace(placeholder, str(folder)), "README.md", "exec"), {})
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == "tensor([[0.7830, 0.0444]])\n"
