"""Tokenizers: built from vocab.txt exactly as transformers builds them, and checked against the weights."""

import json
import sys

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import BertTokenizerFast

from minilm.config import MiniLMConfig
from minilm.weights.files import WeightsError
from minilm.weights.vocabulary import (
    bert_settings,
    check_vocabulary,
    read_tokenizer,
    read_vocabulary,
    tokenizer_from_vocabulary,
    vocabulary,
)

TEXTS = [
    "Hello, café sats!",
    "HELLÖ [SEP] 猫 cat\u0000\u200b",
    "a\tCAT\n  [MASK][CLS]",
    "",
    "x" * 101,
    "ﬁ Ⅻ İstanbul ẞ",
]


def ids(tokenizer, texts=TEXTS):
    if isinstance(tokenizer, str):
        return [encoding.ids for encoding in Tokenizer.from_str(tokenizer).encode_batch(texts)]
    return tokenizer(texts)["input_ids"]


@pytest.fixture
def folder(tmp_path, vocabulary):
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return tmp_path


def configure(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SETTINGS = [
    {},
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "strip_accents": False},
    {"tokenize_chinese_chars": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_vocab_txt_becomes_the_tokenizer_of_transformers(folder, settings):
    configure(folder, **settings)
    theirs = BertTokenizerFast.from_pretrained(folder)
    ours = read_tokenizer(folder)
    assert json.loads(ours) == json.loads(theirs.backend_tokenizer.to_str())
    assert ids(ours) == ids(theirs)


def test_vocab_txt_alone_means_lowercase(folder):
    assert json.loads(read_tokenizer(folder)) == json.loads(
        BertTokenizerFast.from_pretrained(folder).backend_tokenizer.to_str()
    )


def test_the_real_vocab_txt_gives_the_real_tokenizer_json(weights_folder):
    published = json.loads((weights_folder / "tokenizer.json").read_text(encoding="utf-8"))
    built = json.loads(tokenizer_from_vocabulary(read_vocabulary(weights_folder / "vocab.txt")))
    assert published["truncation"] is not None
    assert published["padding"] is not None
    assert built == published | {"truncation": None, "padding": None}
    assert json.loads(read_tokenizer(weights_folder)) == built


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lowercase", [True, False], ids=["json lowercases", "json keeps case"])
def test_tokenizer_config_overrules_tokenizer_json_as_in_transformers(folder, vocabulary, settings, lowercase, caplog):
    (folder / "tokenizer.json").write_text(tokenizer_from_vocabulary(vocabulary, {"do_lower_case": lowercase}))
    configure(folder, tokenizer_class="BertTokenizer", **settings)
    ours = read_tokenizer(folder)
    assert ids(ours) == ids(BertTokenizerFast.from_pretrained(folder))
    assert ("the latter is used" in caplog.text) == (ours != read_tokenizer_json_alone(folder))


def read_tokenizer_json_alone(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    return json.dumps(values, ensure_ascii=False)


def test_a_generic_tokenizer_class_leaves_tokenizer_json_as_it_is(folder, vocabulary):
    text = tokenizer_from_vocabulary(vocabulary, {"do_lower_case": False})
    (folder / "tokenizer.json").write_text(text)
    configure(folder, tokenizer_class="PreTrainedTokenizerFast")
    assert json.loads(read_tokenizer(folder)) == json.loads(text)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_do_lower_case_of_sentence_transformers_lowercases_first(folder, settings):
    configure(folder, **settings)
    plain = Tokenizer.from_str(read_tokenizer(folder)).normalizer
    expected = normalizers.Sequence([normalizers.Lowercase(), plain])
    ours = Tokenizer.from_str(read_tokenizer(folder, lowercase=True)).normalizer
    everything = "x".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    for start in range(0, len(everything), 1000):
        text = everything[start : start + 1000]
        assert ours.normalize_str(text) == expected.normalize_str(text)
    assert ours.normalize_str("CAFÉ 猫 ÀB") == expected.normalize_str("CAFÉ 猫 ÀB")


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        (None, "stra\u00dfe \u00c5".lower()),
        ({"type": "NFD"}, "straße a\u030a"),
        ({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}, "straße a"),
    ],
    ids=["none", "one", "sequence"],
)
def test_do_lower_case_with_any_other_normalizer(folder, vocabulary, normalizer, expected):
    values = json.loads(tokenizer_from_vocabulary(vocabulary)) | {"normalizer": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    ours = Tokenizer.from_str(read_tokenizer(folder, lowercase=True)).normalizer
    assert ours.normalize_str("Straße Å") == expected


def test_empty_lines_at_the_end_are_no_tokens(tmp_path, vocabulary):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(vocabulary).encode() + b"\r\n\r\n")
    assert read_vocabulary(tmp_path / "vocab.txt") == vocabulary


def test_unicode_line_separators_are_tokens_not_line_ends(tmp_path, vocabulary):
    tokens = [*vocabulary, "\u2028", "\x85", "\x0c"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8", newline="\n")
    assert read_vocabulary(tmp_path / "vocab.txt") == tokens


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(WeightsError, match=r"vocab.txt lacks \[SEP\], \[MASK\]"):
        read_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no tokenizer: expected tokenizer.json or vocab.txt"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 3}', "null", ""], ids=repr)
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("rows", "fits"),
    [
        (41, True),
        (40, False),
        (42, False),
        (48, True),
        (128, True),
        (160, True),
        (168, True),
        (176, False),
        (30522, False),
    ],
)
def test_the_vocabulary_must_fit_the_table(vocabulary, rows, fits):
    """Equal, or padded to a multiple of 8 by fewer than 128 rows."""
    config = MiniLMConfig(vocab_size=rows)
    text = tokenizer_from_vocabulary(vocabulary)
    if fits:
        check_vocabulary(text, config, "vocab.txt")
    else:
        with pytest.raises(WeightsError, match=f"vocab.txt has 41 tokens for {rows} rows"):
            check_vocabulary(text, config, "vocab.txt")


def test_added_tokens_count(vocabulary):
    tokenizer = Tokenizer.from_str(tokenizer_from_vocabulary(vocabulary))
    tokenizer.add_tokens(["[NEW]"])
    check_vocabulary(tokenizer.to_str(), MiniLMConfig(vocab_size=42), "tokenizer.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {"vocab": {"a": -1}}, "added_tokens": []}',
        '{"model": {"vocab": {"a": "0"}}, "added_tokens": []}',
        "3",
    ],
)
def test_damaged_ids_are_refused(text):
    with pytest.raises(WeightsError, match="holds no vocabulary"):
        check_vocabulary(text, MiniLMConfig(), "tokenizer.json")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_and_vocabulary_are_found_again(folder, settings):
    configure(folder, **settings)
    text = read_tokenizer(folder)
    found = bert_settings(text)
    assert found.pop("tokenizer_class") == "BertTokenizer"
    assert tokenizer_from_vocabulary(vocabulary(text), found) == tokenizer_from_vocabulary(
        read_vocabulary(folder / "vocab.txt"), settings
    )


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": None},
        {"post_processor": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
    ids=str,
)
def test_another_pipeline_has_no_settings(folder, change):
    assert bert_settings(json.dumps(json.loads(read_tokenizer(folder)) | change)) is None
