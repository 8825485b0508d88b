"""Model cards: what a model is, what it was made from, how good it is and how it is used, in a README.md.

    sizes, settings, origin, fingerprint    from the checkpoint
    scores and their intervals              from what `minilm eval MEASURE --json FILE` wrote of this very model
    all else                                from `Facts`, which people write down

No figure is typed by hand. `minilm weights card` makes one; beside canonical weights it is kept and exported with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from minilm.weights.checkpoint import Checkpoint, fingerprint
from minilm.weights.files import WeightsError
from minilm.weights.load import ST_POOLINGS
from minilm.weights.sources import shipped_models

_ROW = ("name", "licence", "url", "note")  # of a teacher or a source of data; the last two may be left out
_FIGURES = {"sts": "Spearman's rank correlation x 100 of cosines with people's scores, by task. "}

_MINILM = """\
With minilm:

```python
import minilm

encoder = minilm.load("{source}")
vectors = encoder.encode(["A man is eating.", "Someone eats.", "A plane takes off."])
print(encoder.similarity(vectors[:1], vectors[1:]))
```"""
_SENTENCE_TRANSFORMERS = """\
With sentence-transformers, from a folder in its layout: this one if it has a `modules.json`, or what this writes:

```sh
minilm weights export {source} FOLDER --to sentence-transformers
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
vectors = model.encode(["A man is eating.", "Someone eats.", "A plane takes off."])
print(model.similarity(vectors[:1], vectors[1:]))
```"""


@dataclass(frozen=True)
class Facts:
    """What nobody can read off a model's weights; everything may be left out.

    Attributes:
        name: what the model is called.
        summary: what it is, in a sentence or two.
        licence: its licence, in place of the one that its weights came with.
        language: such as `en`.
        base_model: names of the models whose weights it started from.
        teachers: whom it learnt from: `name` and `licence` of each, and if wanted `url` and `note`.
        data: what it was trained on, told in the same way.
        command: what trained it.
        use: what it is for.
        limits: what it can't do, or should not be used for.
    """

    name: str = ""
    summary: str = ""
    licence: str = ""
    language: str = ""
    base_model: Sequence[str] = ()
    teachers: Sequence[Mapping[str, str]] = ()
    data: Sequence[Mapping[str, str]] = ()
    command: str = ""
    use: str = ""
    limits: Sequence[str] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: object = "the facts") -> Facts:
        """Check what a file says.

        Raises:
            WeightsError: an entry is unknown or of another type, or a teacher or source of data lacks its licence.
        """
        known = {field.name: field.default for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise WeightsError(f"{where}: there is no entry {name!r}; there are {', '.join(known)}")
            if name in ("teachers", "data"):
                _check_rows(value, f"{where}: {name}")
            elif known[name] == "" and not isinstance(value, str):
                raise WeightsError(f"{where}: {name} must be a text, got {value!r}")
            elif known[name] == () and not _are_texts(value):
                raise WeightsError(f"{where}: {name} must be a list of texts, got {value!r}")
        return cls(**values)


def model_card(checkpoint: Checkpoint, facts: Facts | None = None, scores: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return a model's card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        checkpoint: the model.
        facts: what else is known.
        scores: of each measure, what `minilm eval MEASURE --json FILE` wrote.

    Raises:
        WeightsError: scores are of another model, or no scores.
    """
    facts = facts or Facts()
    source = facts.name if facts.name in shipped_models() else "path/to/this/folder"
    usage = [_MINILM, *([_SENTENCE_TRANSFORMERS] if _is_exportable(checkpoint) else [])]
    told = json.dumps(checkpoint.provenance, indent=2, sort_keys=True, ensure_ascii=False)
    parts = [
        _front_matter(checkpoint, facts),
        f"# {facts.name or 'Sentence encoder'}",
        facts.summary,
        *(text.format(source=source) for text in usage),
        *_section("What it is", _table(("", ""), _settings(checkpoint, facts))),
        *_section("What it is for", facts.use, "\n".join(f"- {limit}" for limit in facts.limits)),
        *_section("How good it is", *(_scores(measured, fingerprint(checkpoint)) for measured in scores)),
        *_section("What it was made from", *_origin(facts)),
        *_section("Where its weights came from", f"```json\n{told}\n```"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_exportable(checkpoint: Checkpoint) -> bool:
    """Whether sentence-transformers can have this model."""
    return checkpoint.encoding.pooling in ST_POOLINGS.values()


def _licence(checkpoint: Checkpoint, facts: Facts) -> str:
    """Return the licence's name, or `unknown`."""
    return str(facts.licence or checkpoint.provenance.get("licence", "unknown"))


def _front_matter(checkpoint: Checkpoint, facts: Facts) -> str:
    """Return what hubs read, as YAML, of which JSON is a part."""
    licence = _licence(checkpoint, facts)
    library = "sentence-transformers" if _is_exportable(checkpoint) else ""
    values = {
        "language": facts.language,
        "license": "" if licence == "unknown" else licence.lower(),
        "library_name": library,
        "pipeline_tag": "sentence-similarity",
        "tags": [*([library] if library else []), "sentence-similarity", "feature-extraction"],
        "base_model": list(facts.base_model),
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---"])


def _settings(checkpoint: Checkpoint, facts: Facts) -> list[tuple[str, str]]:
    """Return what the checkpoint is, as names and values."""
    config, encoding = checkpoint.config, checkpoint.encoding
    parameters = sum(tensor.numel() for tensor in checkpoint.model_tensors.values())
    stored = checkpoint.tensors["embeddings.word.weight"].dtype
    width = checkpoint.output_width or config.hidden_size
    scaled = "scaled to length 1" if encoding.normalize else "not scaled"
    layer = "" if checkpoint.output_width is None else ", then a linear map without bias"
    return [
        ("vectors", f"{width} numbers, {scaled}, compared by {encoding.similarity}"),
        ("encoder", f"BERT: {config.num_layers} layers, {config.num_heads} heads, width {config.hidden_size}"),
        ("parameters", f"{parameters:,}"),
        ("weights", "rounded to 8 bits" if checkpoint.int8 else str(stored).removeprefix("torch.")),
        ("pooling", encoding.pooling + layer),
        ("texts", f"cut at {encoding.max_seq_length} tokens"),
        ("licence", _licence(checkpoint, facts)),
        ("fingerprint", f"`{fingerprint(checkpoint)}`"),
    ]


def _scores(measured: Mapping[str, Any], mark: str) -> str:
    """Return what was measured of the model with this fingerprint, as a paragraph and a table."""
    try:
        measure, theirs, intervals = measured["measure"], measured["model"]["fingerprint"], measured["intervals"]
        figures = {name: (value, intervals.get(name)) for name, value in measured["figures"].items()}
        rows = [(name, _number(value), _interval(interval)) for name, (value, interval) in figures.items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        expected = "expected what `minilm eval MEASURE --json FILE` writes"
        raise WeightsError(
            f"{expected}, with measure, model, figures and intervals; this is not that ({error!r})"
        ) from error
    if theirs != mark:
        raise WeightsError(
            f"expected {measure} scores of the model with fingerprint {mark[:16]}, got those of {theirs[:16]}; measure "
            "this one, with its own settings and in float32"
        )
    sizes = ", ".join(f"{value:,} {name}" for name, value in measured.items() if isinstance(value, int))
    split = f", {measured['split']}" if "split" in measured else ""
    about = f"`minilm eval {measure}`{split}: {sizes}. {_FIGURES.get(measure, '')}Intervals by bootstrap."
    return f"{about}\n\n{_table((measure, 'figure', '95% interval'), rows)}"


def _number(value: float | None) -> str:
    """Write a figure with four significant digits; one without a value as a dash."""
    return "-" if value is None else f"{value:#.4g}"


def _interval(interval: Mapping[str, float | None] | None) -> str:
    """Write a confidence interval, or nothing where there is none."""
    return "" if interval is None else f"{_number(interval['low'])} to {_number(interval['high'])}"


def _origin(facts: Facts) -> list[str]:
    """Return what the model was made from, as paragraphs and tables."""
    started = f"Started from {', '.join(facts.base_model)}." if facts.base_model else ""
    tables = [
        f"{kind}:\n\n{_table(('name', 'licence', 'note'), [_row(row) for row in rows])}"
        for kind, rows in (("Teachers", facts.teachers), ("Training data", facts.data))
        if rows
    ]
    return [started, *tables, f"Trained by:\n\n```sh\n{facts.command.strip()}\n```" if facts.command else ""]


def _row(row: Mapping[str, str]) -> tuple[str, str, str]:
    """Return a teacher or a source of data as cells."""
    name = f"[{row['name']}]({row['url']})" if "url" in row else row["name"]
    return name, row["licence"], row.get("note", "")


def _section(title: str, *parts: str) -> list[str]:
    """Return a section, or nothing if there is nothing in it."""
    return [f"## {title}", *parts] if any(parts) else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _are_texts(value: Any) -> bool:
    """Whether this is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _check_rows(rows: Any, where: str) -> None:
    """Raise `WeightsError` unless these are tables that name things and their licences."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise WeightsError(f"{where} must be a list of tables, got {rows!r}")
    for row in rows:
        if not {"name", "licence"} <= row.keys() <= set(_ROW) or not _are_texts(list(row.values())):
            raise WeightsError(
                f"{where}: expected the texts name and licence, and if wanted url and note; got {dict(row)}"
            )
