"""What is measured: names, lengths, texts and FLOPs."""

import numpy as np
import pytest

from minilm import MiniLMConfig
from minilm.bench.workloads import DEFAULTS, Texts, Workload, build, choose, parse, token_sequences


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text-short-256", ("texts", "short", 256)),
        ("text-512-32", ("texts", 512, 32)),
        ("tokens-mixed-4k", ("tokens", "mixed", 4096)),
        ("tokens-128-128", ("tokens", 128, 128)),
        ("attention-64-64k", ("attention", 64, 65536)),
    ],
)
def test_parse(name, expected):
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name", ["", "text", "tokens-short-64", "text-2-5", "tokens-128-64", "text-short-0", "text-short-k", "x-16-16"]
)
def test_unknown_workload(name):
    with pytest.raises(ValueError, match="workload"):
        parse(name)


@pytest.mark.parametrize("device", DEFAULTS)
@pytest.mark.parametrize("kind", ["texts", "tokens", "attention"])
def test_a_kind_is_all_usual_workloads_of_that_kind(kind, device):
    names = choose([kind, kind], device)
    assert {parse(name)[0] for name in names} == {kind}
    assert len(set(names)) == len(names) >= 4


def test_the_grid_goes_from_one_sentence_to_256k_tokens():
    sizes = [parse(name)[2] for name in choose(["tokens"], "cuda:0") if name.startswith("tokens-32-")]
    assert (min(sizes), max(sizes)) == (32, 256 * 1024)


@pytest.mark.parametrize(
    ("name", "lengths", "title"),
    [
        ("tokens-16-64", [16] * 4, "64 tokens in sequences of 16"),
        ("tokens-16-70", [16] * 4, "70 tokens in sequences of 16"),
        ("tokens-32-32", [32], "1 sequence of 32 tokens"),
        ("attention-512-1k", [512] * 2, "attention, 1k tokens in sequences of 512"),
        ("text-short-1", None, "1 short sentence"),
        ("text-128-2", [128] * 2, "2 texts of 128 tokens"),
        ("text-mixed-3", None, "3 texts of mixed length"),
    ],
)
def test_build(texts, name, lengths, title):
    (workload,), refused = build([name], texts, 512)
    assert workload.title == title
    assert lengths is None or workload.lengths == tuple(lengths)
    assert workload.num_tokens == sum(workload.lengths)
    assert not refused
    assert Workload.from_dict(workload.to_dict()) == workload


def test_tokens_of_mixed_length_sum_to_the_size(texts):
    (workload,), _ = build(["tokens-mixed-4k"], texts, 512)
    assert 4096 - 3 < workload.num_tokens <= 4096
    assert len(set(workload.lengths)) > 10
    assert max(workload.lengths) <= 128
    assert min(workload.lengths) >= 3


def test_sequences_longer_than_the_model_takes_are_refused(texts):
    made, refused = build(["tokens-512-512", "text-256-1", "attention-512-512"], texts, 128)
    assert [workload.name for workload in made] == ["attention-512-512"]
    assert list(refused) == ["tokens-512-512", "text-256-1"]
    assert "at most 128" in refused["text-256-1"]


@pytest.mark.parametrize(
    ("form", "allowed"), [("short", range(10, 15)), (128, [128]), (37, [37]), ("mixed", range(5, 300))]
)
def test_texts_are_distinct_and_as_long_as_wanted(texts, form, allowed):
    made = texts.make(form, 40)
    assert len(set(made)) == 40
    assert all(texts.count_tokens(text) in allowed for text in made)
    assert made == Texts(texts.sentences, texts.count_tokens).make(form, 40)


def test_texts_of_real_tokens_are_as_long_as_wanted(encoder, own_sentences):
    texts = Texts(own_sentences, lambda text: encoder.token_counts([text])[0])
    assert encoder.token_counts(texts.make(128, 5)) == [128] * 5
    lengths = texts.mixed_lengths()
    assert min(lengths) < 15 < 40 < max(lengths) <= 128


def test_too_few_sentences():
    texts = Texts(["one two three four five six seven eight"], lambda text: len(text.split()) + 2)
    assert texts.make("short", 1)
    with pytest.raises(ValueError, match="too few for 50"):
        texts.make("short", 50)
    with pytest.raises(ValueError, match="none"):
        Texts(["", " "], len)


def test_flops_of_the_usual_model():
    """21.23 MFLOP a token, and 9,216 for each token that it attends to; attention alone, a sixth of that."""
    config = MiniLMConfig()
    tokens = Workload("tokens-128-256", "tokens", "", (128, 128))
    assert tokens.flops(config) == 256 * 21_233_664 + 9_216 * 2 * 128**2
    attention = Workload("attention-128-256", "attention", "", (128, 128))
    assert attention.flops(config) == 1_536 * 2 * 128**2


def test_least_bytes():
    config = MiniLMConfig()
    one = Workload("tokens-16-16", "tokens", "", (16,))
    assert one.least_bytes(config, 2) == 2 * (10_616_832 + 384 * 17)
    assert Workload("attention-16-16", "attention", "", (16,)).least_bytes(config, 4) == 4 * 4 * 384 * 16


@pytest.mark.parametrize(
    ("name", "headline", "looked_into"),
    [
        ("tokens-128-64k", True, True),
        ("tokens-16-64k", True, False),
        ("tokens-128-1k", False, False),
        ("tokens-32-32", True, True),
        ("tokens-64-64", False, True),
        ("attention-64-64k", True, False),
        ("text-short-1", True, False),
    ],
)
def test_which_workloads_matter_most(texts, name, headline, looked_into):
    (workload,), _ = build([name], texts, 512)
    assert (workload.is_headline, workload.is_looked_into) == (headline, looked_into)


def test_token_sequences_are_running_text_between_special_tokens():
    corpus = np.arange(10, 17)
    assert token_sequences([4, 3, 9], corpus, (1, 2), 0) == [
        [1, 10, 11, 2],
        [1, 12, 2],
        [1, 13, 14, 15, 16, 10, 11, 12, 2],
    ]
    other = token_sequences([4, 3, 9], corpus, (1, 2), 1)
    assert [len(sequence) for sequence in other] == [4, 3, 9]
    assert other[0] == [1, 10 + 7_919 % 7, 10 + 7_920 % 7, 2]
