"""Token ids against the reference tokenizer, and cutting texts that are too long."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import transformers

from minilm.tokenizer import LONGEST_WORD, TokenizedText, Tokenizer

TEXTS = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
LIMITS = (3, 4, 5, 16, 127, 128, 512)
PIECES = (  # what a tokeniser may trip over, beside single characters of all of Unicode
    *("[SEP]", "[MASK]", "[cls]", "hello", "World", "un-believable", "x" * 101, *" .,!?'\"-()[]{}#@$\t\n\r"),
    *("e\u0301", "\u0301", "\u0323", "a\u0345", *"\x0b\x0c\x1c\x1d\x1f\x85\xa0\x00\x7f\u200b\u200d"),
    *"\u2028\u3000\ufeff\ufffd\u0130\u0131\u017f\u03a3\u03c2\xdf\u01c5\u4e2d\u65e5\ud55c\u0905\U0001f469",
)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return encoder.tokenizer


@pytest.fixture(scope="module")
def reference(weights_folder):
    return transformers.AutoTokenizer.from_pretrained(weights_folder)


@pytest.fixture(scope="module")
def rust(weights_folder):
    """The plain `tokenizers` object, whose own truncation is the reference for ours."""
    whole = tokenizers.Tokenizer.from_file(str(weights_folder / "tokenizer.json"))
    whole.no_padding()
    whole.no_truncation()
    return whole


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ids_equal_the_reference(tokenizer, reference, text):
    expected = reference(text, truncation=False)
    tokenized = tokenizer(text)
    assert (tokenized.ids, tokenized.type_ids) == (expected["input_ids"], expected["token_type_ids"])


def test_words_alone_give_the_ids_of_the_whole_text(tokenizer, rust):
    """However odd the characters on either side of a space."""
    rng = random.Random(0)
    for _ in range(4_000):
        parts = [rng.choice(PIECES) if rng.random() < 0.7 else chr(rng.randrange(0xD800)) for _ in range(12)]
        text = "".join(part + " " * rng.choice((0, 0, 1, 1, 2)) for part in parts)
        assert tokenizer(text).ids == rust.encode(text).ids, repr(text)


def test_remembered_words_are_bounded_and_shared_by_threads(rust, monkeypatch):
    monkeypatch.setattr("minilm.tokenizer.KNOWN_WORDS", 50)
    own = Tokenizer(rust.to_str())
    texts = [" ".join(f"word{(i * j) % 97}" for j in range(9)) + " " + "y" * (LONGEST_WORD + 1) for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert [text.ids for text in pool.map(own, texts)] == [rust.encode(text).ids for text in texts]
    assert 0 < len(own._words) <= 50 + 4
    assert max(map(len, own._words)) <= LONGEST_WORD


@pytest.mark.parametrize("change", ["added token", "normaliser", "pre-tokeniser"])
def test_tokenizers_that_look_across_spaces_see_the_whole_text(rust, change):
    other = tokenizers.Tokenizer.from_str(rust.to_str())
    if change == "added token":
        other.add_tokens([tokenizers.AddedToken("new york", normalized=False)])
    elif change == "normaliser":
        other.normalizer = tokenizers.normalizers.Replace("new york", "city")
    else:
        other.pre_tokenizer = tokenizers.pre_tokenizers.Split("new york", "merged_with_previous")
    text = "in new york now"
    assert Tokenizer(other.to_str())(text).ids == other.encode(text).ids
    assert other.encode(text).ids != rust.encode(text).ids


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("text", [TEXTS[n] for n in ("empty", "no", "90-words", "400-words")], ids=[0, 1, 90, 400])
def test_truncation_equals_the_reference(tokenizer, reference, text, limit):
    expected = reference(text, truncation=True, max_length=limit)
    assert tokenizer.truncate(tokenizer(text), limit).ids == expected["input_ids"]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("sizes", [(0, 0), (1, 9), (9, 1), (60, 80), (80, 60), (300, 2), (300, 299)], ids=str)
def test_pair_truncation_equals_the_reference(tokenizer, rust, sizes, limit):
    pair = " ".join(["one"] * sizes[0]), " ".join(["two"] * sizes[1])
    rust.enable_truncation(limit, strategy="longest_first")
    expected = rust.encode(*pair)
    rust.no_truncation()
    cut = tokenizer.truncate(tokenizer(pair), limit)
    assert (cut.ids, cut.type_ids) == (expected.ids, expected.type_ids)


@pytest.mark.parametrize("limit", [8, 64, 128])
@pytest.mark.parametrize("size", [1, 62, 63, 126, 127, 128, 500])
def test_windows_cover_every_token_and_overlap_by_a_quarter(tokenizer, size, limit):
    content = list(range(1_000, 1_000 + size))
    text = TokenizedText([tokenizer.cls_id, *content, tokenizer.sep_id])
    windows = tokenizer.chunk(text, limit)
    assert all(len(window) <= limit for window in windows)
    assert all((w.ids[0], w.ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id) for w in windows)
    seen = [w.ids[1:-1] for w in windows]
    overlap = (limit - 2) // 4
    assert all(a[-overlap:] == b[:overlap] for a, b in pairwise(seen))
    assert seen[0] + [i for window in seen[1:] for i in window[overlap:]] == content
    assert len(windows) == 1 or len(windows[-1]) > overlap + 2  # the last window brings something new


def test_a_pair_cannot_be_split_into_windows(tokenizer):
    with pytest.raises(ValueError, match="a text pair can't be split"):
        tokenizer.chunk(tokenizer(("one " * 9, "two " * 9)), 8)


def test_tokens_are_readable(tokenizer):
    assert tokenizer.tokens(tokenizer("unaffordable").ids) == ["[CLS]", "una", "##ff", "##ord", "##able", "[SEP]"]
    assert tokenizer.tokens([10**6]) == ["[1000000]"]


def test_damaged_description():
    with pytest.raises(ValueError, match="this tokenizer description can't be read"):
        Tokenizer("{}")


def test_a_tokenizer_without_a_frame_is_refused():
    bare = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="around a text, got 0 tokens"):
        Tokenizer(bare.to_str())
