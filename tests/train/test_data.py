"""Files of every format as the rows that were written, and every bad row by its name."""

import gzip
import json
import lzma
import tracemalloc

import pytest

from minilm.train.data import Draw, Source, make_table, read_table
from minilm.train.rows import DataError, Strings, read_records

ROWS = [  # quotes, blanks at the ends, a no-break space and a line separator belong to the text
    {"query": 'who is "Ada"?', "positive": " Ada Lovelace\u00a0wrote.", "score": "0.5"},
    {"query": "naïve,\u2028comma", "positive": "日本語 ok", "score": "-1e-3"},
]
COLUMNS = {"query": "text", "positive": "text", "score": "number"}


def tsv(rows, header=True):
    lines = ["\t".join(ROWS[0])] if header else []
    return "".join(line + "\n" for line in [*lines, *("\t".join(row.values()) for row in rows)])


def csv(rows):
    quoted = ['"' + '","'.join(value.replace('"', '""') for value in row.values()) + '"' for row in rows]
    return "\r\n".join([",".join(ROWS[0]), *quoted])


FILES = {
    "rows.tsv": tsv(ROWS).encode(),
    "crlf.tsv": tsv(ROWS).replace("\n", "\r\n").encode(),
    "bom.tsv": tsv(ROWS).encode("utf-8-sig"),
    "rows.tsv.xz": lzma.compress(tsv(ROWS).encode()),
    "rows.csv": csv(ROWS).encode(),
    "rows.csv.gz": gzip.compress(csv(ROWS).encode()),
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    "rows.jsonl.xz": lzma.compress("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()),
    "rows.json": json.dumps(ROWS).encode(),
}


def rows_of(table):
    return [{name: column[row] for name, column in table.columns.items()} for row in range(len(table))]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    table = read_table(Source(name, COLUMNS), tmp_path)
    assert rows_of(table) == [{**row, "score": float(row["score"])} for row in ROWS]
    first = 1 if ".json" in name else 2
    assert [table.where(row) for row in (0, 1)] == [f"{tmp_path / name}, line {line}" for line in (first, first + 1)]


def test_without_a_header(tmp_path):
    (tmp_path / "rows.tsv").write_text(tsv(ROWS, header=False))
    source = Source("rows.tsv", {"text": "text"}, fields=("other", "text", "rest"))
    assert list(read_table(source, tmp_path).columns["text"]) == [row["positive"] for row in ROWS]


@pytest.mark.parametrize("name", ["lines.txt", "lines", "lines.txt.gz"])
def test_lines_of_text(tmp_path, name):
    content = b"one\ttab\r\n  two \n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_table(Source(name, {"text": "text"}), tmp_path).columns["text"]) == ["one\ttab", "  two "]


def test_a_csv_row_may_span_lines(tmp_path):
    (tmp_path / "rows.csv").write_text('text\n"two\nlines"\n""\n')
    with pytest.raises(DataError, match=r"rows\.csv, line 4: 'text' is empty"):
        read_table(Source("rows.csv", {"text": "text"}), tmp_path)


PASSAGES = [
    {
        "query": "honey?",
        "positive_passages": [{"docid": "1", "title": "Bees", "text": "They make it."}],
        "negative_passages": [{"title": "", "text": "Cars."}, {"text": "Bread."}, "Sheep."],
    }
]


def test_the_reference_trainers_rows():
    source = Source(
        "rows",
        {"query": "text", "positives": "texts", "negatives": "texts"},
        rename={"positive_passages": "positives", "negative_passages": "negatives"},
    )
    expected = {"query": "honey?", "positives": ["Bees They make it."], "negatives": ["Cars.", "Bread.", "Sheep."]}
    assert rows_of(make_table(PASSAGES, source)) == [expected]
    texts = Source("rows", {"positive_passages": "texts"}, text_fields=["text"])
    assert rows_of(make_table(PASSAGES, texts)) == [{"positive_passages": ["They make it."]}]


BAD = {
    "missing column": ({"query": "a", "negatives": ["b"]}, "no 'score'"),
    "null": ({"query": None, "negatives": ["b"], "score": 1}, "no 'query'"),
    "empty text": ({"query": " \t", "negatives": ["b"], "score": 1}, "'query' is empty"),
    "no text": ({"query": 7, "negatives": ["b"], "score": 1}, "'query' is no text: 7"),
    "no negatives": ({"query": "a", "negatives": [], "score": 1}, "'negatives' holds no text"),
    "empty negative": ({"query": "a", "negatives": ["b", ""], "score": 1}, "'negatives' is empty"),
    "empty passage": ({"query": "a", "negatives": [{"docid": "b"}], "score": 1}, "'negatives' is empty"),
    "NaN score": ({"query": "a", "negatives": ["b"], "score": float("nan")}, "'score' is no finite number: nan"),
    "infinite score": ({"query": "a", "negatives": ["b"], "score": "inf"}, "'score' is no finite number: 'inf'"),
    "score in words": ({"query": "a", "negatives": ["b"], "score": "high"}, "'score' is no finite number: 'high'"),
    "lone surrogate": ({"query": "a\ud800", "negatives": ["b"], "score": 1}, "'query' is not UTF-8 at character 1"),
    "no object": (["a"], r"not an object with fields: \['a'\]"),
}
GOOD = {"query": "a", "negatives": ["b"], "score": 1}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(row, message, tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (GOOD, GOOD, row, GOOD)))
    columns = {"query": "text", "negatives": "texts", "score": "number"}
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: {message}.*on_bad_row"):
        read_table(Source("rows.jsonl", columns), tmp_path)
    table = read_table(Source("rows.jsonl", columns, on_bad_row="skip"), tmp_path)
    assert (len(table), list(table.lines), list(table.skipped.values())) == (3, [1, 2, 4], [1])
    assert "skipped 1 bad rows: 1 x " in caplog.text
    assert "rows.jsonl, line 3)" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.tsv", b"a\tb\n1\t2\n3\n", r"line 3: a wrong number of fields: expected 2 \(a, b\), got 1"),
        ("rows.tsv", b"a\tb\n1\t2\n1\t2\t3\n", r"line 3: a wrong number of fields"),
        ("rows.tsv", b"a\tb\n1\t2\n\xff\t4\n", "line 3: 'a' is not UTF-8"),
        ("rows.jsonl", b'{"a": "1"}\n{"a": "2"\n', "line 2: not JSON"),
    ],
    ids=["short", "long", "encoding", "json"],
)
def test_a_line_that_cannot_be_parsed(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(Source(name, {"a": "text"}), tmp_path)
    assert list(read_table(Source(name, {"a": "text"}, on_bad_row="skip"), tmp_path).columns["a"]) == ["1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.tsv.xz", lzma.compress(b"a\n" * 9999)[:-40], "damaged or cut short"),
        ("rows.tsv.gz", gzip.compress(b"a\n" * 9999)[:-20], "damaged or cut short"),
        ("rows.tsv.gz", b"a\n1\n", "damaged or cut short"),
        ("rows.json", b'{"a": "1"}', "expected a list of objects, got dict"),
        ("rows.json", b"[", "not what its suffix says"),
        ("rows.csv", b'a\n"1"2\n', "not what its suffix says"),
        ("rows.tsv", b"", "holds no row"),
        ("rows.tsv", b"a\n", "holds no row"),
    ],
    ids=["xz", "gz", "not gz", "no list", "no json", "no csv", "empty", "header only"],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(Source(name, {"a": "text"}, on_bad_row="skip"), tmp_path)


CAPTIONS = "1\ta\n2\tb\n1\tc\n2\tb\n3\td\n1\te\n"


def test_groups_become_rows(tmp_path):
    (tmp_path / "captions.tsv").write_text(CAPTIONS)
    settings = {"columns": {"image": "label", "text": "text"}, "fields": ("image", "text"), "group_by": "image"}
    table = read_table(Source("captions.tsv", **settings), tmp_path)
    groups = [("1", ["a", "c", "e"]), ("2", ["b"]), ("3", ["d"])]
    assert rows_of(table) == [{"image": image, "text": texts} for image, texts in groups]
    assert list(table.lines) == [1, 2, 5]
    paired = Source("captions.tsv", **settings, draw=[{"column": "text", "into": ["query", "positive"]}])
    with pytest.raises(DataError, match=r"line 2: 'text' holds fewer than 2 texts: \['b'\]"):
        read_table(paired, tmp_path)


def test_only_some_rows_are_kept(tmp_path):
    (tmp_path / "captions.tsv").write_text(CAPTIONS)
    columns = {"text": "text", "source": "label"}
    kept = Source("captions.tsv", {"text": "text"}, fields=("image", "text"), keep={"image": ["2", "3"]})
    assert list(read_table(kept, tmp_path).columns["text"]) == ["b", "b", "d"]
    (tmp_path / "origins.tsv").write_text("first_line\tlast_line\tsource\n5\t6\tlate\n2\t3\tearly\n")
    by_line = Source("captions.tsv", columns, fields=("image", "text"), origins="origins.tsv")
    table = read_table(by_line, tmp_path)
    assert list(zip(table.columns["text"], table.columns["source"], strict=True)) == [
        *(("b", "early"), ("c", "early")),
        *(("d", "late"), ("e", "late")),
    ]
    assert list(table.lines) == [2, 3, 5, 6]
    weighed = Source(
        "captions.tsv", columns, fields=("image", "text"), origins="origins.tsv", weigh_by="source", weight={"late": 2}
    )
    assert list(read_table(weighed, tmp_path).columns["text"]) == ["d", "e"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"a": "word"}}, "each column has a kind"),
        ({"columns": {}}, "each column has a kind"),
        ({"group_by": "a"}, "group_by is a label"),
        ({"columns": {"a": "label", "b": "number"}, "group_by": "a"}, "beside columns of kind text"),
        ({"draw": [{"column": "a"}]}, "draw takes from columns of kind texts"),
        ({"distinct": ["b"]}, "distinct columns are of kind text or label"),
        ({"weight": 0}, "weights are positive"),
        ({"weight": {"x": 1}}, "weigh_by is the label"),
        ({"weigh_by": "a"}, "weigh_by is the label"),
        ({"on_bad_row": "ignore"}, "on_bad_row is one of error, skip"),
        ({"colour": 1}, "unknown data setting colour"),
        ({"path": None, "columns": None}, "no source"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(DataError, match=message):
        Source.from_settings({"path": "x", "columns": {"a": "text"}, **settings})


def test_a_draw_of_several_lists_is_refused():
    with pytest.raises(DataError, match="a count must be at least 1 and go into one column"):
        Draw("captions", into=("query", "positive"), count=2)


def test_columns_take_little_more_memory_than_their_text(tmp_path):
    text = "twenty-four characters! "
    (tmp_path / "lines.txt").write_text((text * 4 + "\n") * 20_000)
    tracemalloc.start()
    table = read_table(Source("lines.txt", {"text": "text"}), tmp_path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 20_000
    assert size < 1.35 * 20_000 * (4 * len(text) + 16)  # the text, its end, its line; arrays grow ahead
    assert peak < 2.5 * 20_000 * (4 * len(text) + 16)


def test_strings_by_place():
    strings = Strings()
    for text in ("a", "", "é日"):
        strings.append(text)
    assert (strings[-1], strings[1], list(strings)) == ("é日", "", ["a", "", "é日"])
    with pytest.raises(IndexError):
        strings[3]


def test_files_are_read_as_they_are_asked_for(tmp_path):
    (tmp_path / "lines.txt.xz").write_bytes(lzma.compress(b"one\ntwo\n" * 50_000)[:-40])
    assert next(read_records(tmp_path / "lines.txt.xz")) == (1, {"text": "one"})  # not yet at the damage
