"""Files of evaluation data: what is read, and that an error says where it is."""

import gzip
import lzma

import pytest

from minilm.evaluate.files import EvaluationDataError, read_columns, read_lines, read_records

TEXT = '\ufeffa "quoted"\tb\r\n\u00a0 c\u2028d \t\n'.encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)], ids=["plain", "gz", "xz"]
)
def test_lines_are_read_to_the_letter(tmp_path, suffix, pack):
    path = tmp_path / f"x.tsv{suffix}"
    path.write_bytes(pack(TEXT))
    assert list(read_lines(path)) == [(1, 'a "quoted"\tb'), (2, "\u00a0 c\u2028d \t")]
    assert list(read_columns(str(path), "x<TAB>y")) == [(1, ['a "quoted"', "b"]), (2, ["\u00a0 c\u2028d ", ""])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"", "x.tsv is empty"),
        ("x.tsv", b"a\tb\n\xe9\tb\n", "x.tsv, line 2 is not UTF-8"),
        ("x.tsv", b"a\tb\na\tb\tc\td\n", "x.tsv, line 2: expected x<TAB>y or x<TAB>y<TAB>z, got 4 columns"),
        ("x.tsv.gz", gzip.compress(b"a\tb\n")[:-4], "x.tsv.gz is damaged after line"),
        ("x.tsv.gz", b"plain", "x.tsv.gz is damaged after line 0"),
        ("x.tsv.xz", b"plain", "x.tsv.xz is damaged after line 0"),
    ],
    ids=["empty", "latin1", "columns", "cut", "no_gz", "no_xz"],
)
def test_malformed_columns(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationDataError, match=message):
        list(read_columns(tmp_path / name, "x<TAB>y", "x<TAB>y<TAB>z"))


def test_missing_file(tmp_path):
    with pytest.raises(EvaluationDataError, match=r"cannot read .*nowhere.tsv: No such file"):
        list(read_lines(tmp_path / "nowhere.tsv"))


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "no JSON"),
        ("[1]", "list"),
        ('{"_id": 3, "text": ""}', "no string '_id'"),
        ('{"_id": "3"}', "no .* 'text'"),
    ],
    ids=["json", "list", "number", "missing"],
)
def test_malformed_records(tmp_path, line, got):
    (tmp_path / "x.jsonl").write_text('{"_id": "1", "text": "a"}\n' + line)
    records = read_records(tmp_path / "x.jsonl", "_id", "text")
    assert next(records) == (1, {"_id": "1", "text": "a"})
    with pytest.raises(
        EvaluationDataError, match=f"line 2: expected a JSON object with the strings _id, text, got {got}"
    ):
        next(records)
