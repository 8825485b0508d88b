"""`SentenceEncoder`: forms in and out, options, cut texts, and a vector that depends on its text alone."""

import asyncio
import json
import random
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import minilm
from minilm.embed import TruncationWarning, plan_batches

ODD_TEXTS = list(json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8")).values())
LONG = "one two three " * 100  # 302 tokens


@pytest.fixture
def texts(own_sentences):
    return own_sentences[:24]


@pytest.fixture
def own_encoder(canonical_folder):
    """An encoder that a test may change."""
    return minilm.load(canonical_folder, device="cpu")


# Forms in and out.


def test_one_text_is_one_vector(encoder, texts):
    vector = encoder.encode(texts[0])
    assert (vector.shape, vector.dtype) == ((384,), np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("form", [list, tuple, iter, np.array, pd.Series], ids=lambda form: form.__name__)
def test_any_iterable_gives_rows_in_its_order(encoder, texts, form):
    rows = encoder.encode(form(texts))
    assert (rows.shape, rows.dtype) == ((24, 384), np.float32)
    for index in (0, 7, 23):
        np.testing.assert_allclose(rows[index], encoder.encode(texts[index]), atol=1e-6)


@pytest.mark.parametrize("empty", [[], (), iter(()), pd.Series([], dtype=object)], ids=["list", "tuple", "iter", "pd"])
def test_nothing_gives_no_rows(encoder, empty):
    rows = encoder.encode(empty)
    assert (rows.shape, rows.dtype) == ((0, 384), np.float32)


def test_nothing_in_every_precision(encoder):
    assert encoder.encode([], precision="ubinary").shape == (0, 48)
    assert encoder.encode([], precision="int8", truncate_dim=8).dtype == np.int8
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 384)
    assert encoder.encode([], convert_to_numpy=False) == []
    assert encoder.encode([], output_value="token_embeddings") == []


def test_sentences_is_another_name_of_inputs(encoder, texts):
    np.testing.assert_array_equal(encoder.encode(sentences=texts), encoder.encode(inputs=texts))
    with pytest.raises(TypeError, match="either as inputs"):
        encoder.encode(texts, sentences=texts)
    with pytest.raises(TypeError, match="needs one"):
        encoder.encode()


def test_equal_texts_are_computed_once(encoder, monkeypatch):
    counted = []
    forward = type(encoder.model).forward
    monkeypatch.setattr(
        type(encoder.model), "forward", lambda *a, **k: counted.append(a[1].num_sequences) or forward(*a, **k)
    )
    rows = encoder.encode(["a cat", "a dog", "a cat", "a cat"])
    assert sum(counted) == 2
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision must be one of float32, int8, uint8, binary, ubinary; got 'int4'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"truncate_dim": 385}, "truncate_dim must be at most 384, got 385"),
        ({"truncate_dim": 0}, "truncate_dim must be a positive integer"),
        ({"prompt_name": "query"}, "no prompt named 'query'; it has: none"),
        ({"output_value": "logits"}, "output_value must be sentence_embedding or token_embeddings"),
        ({"on_truncate": "drop"}, "on_truncate must be one of warn, ignore, error, chunk"),
        ({"output_value": "token_embeddings", "on_truncate": "chunk"}, "token embeddings can't be had"),
    ],
)
def test_options_out_of_range(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(["a"], **options)


def test_bad_texts_are_refused_before_any_work(encoder, monkeypatch):
    monkeypatch.setattr(type(encoder.model), "forward", None)
    with pytest.raises(TypeError, match="expected text 2 to be a string, got float"):
        encoder.encode(pd.Series(["a", "b", float("nan")]))


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: repr(text[:20]))
def test_odd_texts_give_finite_unit_vectors(encoder, text):
    vector = encoder.encode(text, on_truncate="ignore")
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_a_megabyte_of_text(encoder):
    with pytest.warns(TruncationWarning, match="the longest has 200002"):
        vector = encoder.encode("word " * 200_000)
    np.testing.assert_allclose(vector, encoder.encode("word " * 126), atol=1e-6)


# A vector depends on its text alone.


@pytest.mark.parametrize("batch_size", [1, 3, 32, 1_000])
def test_packing_changes_nothing(encoder, texts, batch_size):
    alone = np.stack([encoder.encode(text, on_truncate="ignore") for text in texts + ODD_TEXTS])
    shuffled = list(range(len(alone)))
    random.Random(batch_size).shuffle(shuffled)
    rows = encoder.encode([(texts + ODD_TEXTS)[i] for i in shuffled], batch_size=batch_size, on_truncate="ignore")
    assert np.abs(rows - alone[shuffled]).max() <= 1e-6


def test_the_same_input_twice_is_equal_to_the_bit(encoder, texts):
    assert np.array_equal(encoder.encode(texts), encoder.encode(texts))


@pytest.mark.parametrize("thread_count", [1, 2, 3, 8])
def test_deterministic_vectors_are_equal_to_the_bit(encoder, texts, thread_count):
    everything = texts + ODD_TEXTS
    expected = {text: encoder.encode(text, deterministic=True, on_truncate="ignore") for text in everything}
    before = torch.get_num_threads()
    torch.set_num_threads(thread_count)
    try:
        for batch_size in (1, 7, 32):
            random.Random(batch_size).shuffle(everything)
            some = everything[: 5 * batch_size]
            options = {"batch_size": batch_size, "deterministic": True, "on_truncate": "ignore"}
            for text, row in zip(some, encoder.encode(some, **options), strict=True):
                assert row.tobytes() == expected[text].tobytes()
        assert torch.get_num_threads() == thread_count
    finally:
        torch.set_num_threads(before)


def test_eight_threads_at_once(encoder, texts):
    expected = [encoder.encode(texts[i : i + 3]) for i in range(8)]
    results = [[] for _ in range(8)]

    def work(i):
        for round_ in range(4):
            results[i].append(encoder.encode(texts[i : i + 3]))
            results[i].append(encoder.encode(texts[i : i + 3], deterministic=round_ % 2 == 0))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    deterministic = [encoder.encode(texts[i : i + 3], deterministic=True) for i in range(8)]
    for i, rows in enumerate(results):
        assert len(rows) == 8
        for index, row in enumerate(rows):
            assert np.array_equal(row, (deterministic if index % 4 == 1 else expected)[i])


def test_under_asyncio(encoder, texts):
    async def gather():
        return await asyncio.gather(*(asyncio.to_thread(encoder.encode, text) for text in texts[:6]))

    for text, vector in zip(texts, asyncio.run(gather()), strict=False):
        assert np.array_equal(vector, encoder.encode(text))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"precision": "int8"}], ids=str)
def test_the_process_is_left_as_it_was(own_encoder, texts, options):
    import os

    def state():
        return dict(os.environ), torch.get_num_threads(), torch.get_rng_state().tolist(), random.getstate()

    before, numpy_before = state(), np.random.get_state()[1].tolist()
    own_encoder.encode(texts, **options)
    assert state() == before
    assert np.random.get_state()[1].tolist() == numpy_before


def test_loading_leaves_the_random_state(canonical_folder):
    before = torch.get_rng_state()
    minilm.load(canonical_folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


# Texts that are too long.


def test_one_warning_a_call(encoder):
    with pytest.warns(TruncationWarning) as caught:
        encoder.encode([LONG, "short", LONG, LONG + "more"])
    (warning,) = caught
    assert "3 texts were longer than 128 tokens and cut there (the longest has 303)" in str(warning.message)
    assert warning.filename == __file__
    for encode in (encoder.encode_query, encoder.tokenize, lambda text: list(encoder.encode_stream(text))):
        with pytest.warns(TruncationWarning) as caught:
            encode([LONG])
        assert [w.filename for w in caught] == [__file__]


def test_ignore_and_error(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(LONG, on_truncate="ignore")
    with pytest.raises(ValueError, match="text 2 has 302 tokens, more than the limit of 128"):
        encoder.encode(["short", "short", LONG], on_truncate="error")


def test_chunks_are_averaged_by_length(encoder):
    text = encoder.tokenizer(LONG)
    windows = encoder.tokenizer.chunk(text, 128)
    assert [len(window) for window in windows] == [128, 128, 112]
    with torch.inference_mode():
        outputs = [encoder.model(minilm.PackedBatch.from_sequences([window.ids])) for window in windows]
    states = [output.last_hidden_state.numpy() for output in outputs]
    mean = sum(len(w) * s.mean(axis=0) for w, s in zip(windows, states, strict=True)) / sum(map(len, windows))
    rows = encoder.encode(["short", LONG, LONG], on_truncate="chunk")
    np.testing.assert_allclose(rows[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.array_equal(rows[1], rows[2])
    np.testing.assert_allclose(rows[0], encoder.encode("short"), atol=1e-6)


def test_the_limit_can_be_raised_to_the_position_table(own_encoder):
    own_encoder.max_seq_length = 512
    own_encoder.encode(LONG, on_truncate="error")
    with pytest.raises(ValueError, match="at most 512 for this model, got 513"):
        own_encoder.max_seq_length = 513
    assert own_encoder.max_seq_length == 512


def test_token_counts(encoder):
    assert encoder.token_counts(["", "hello", LONG]) == [2, 3, 302]


# Prompts, streams, search, and moving around.


def test_prompts(canonical_folder):
    from dataclasses import replace

    from minilm.weights.load import read_checkpoint

    checkpoint = read_checkpoint(canonical_folder)
    prompts = {"query": "query: ", "passage": "passage: "}
    encoder = minilm.SentenceEncoder(replace(checkpoint, encoding=replace(checkpoint.encoding, prompts=prompts)))
    assert np.array_equal(encoder.encode_query("x"), encoder.encode("query: x"))
    assert np.array_equal(encoder.encode_document(["x"]), encoder.encode(["passage: x"]))
    assert np.array_equal(encoder.encode("x", prompt_name="query"), encoder.encode("query: x"))
    assert np.array_equal(encoder.encode_query("x", prompt="other: "), encoder.encode("other: x"))
    encoding = replace(encoder.encoding, default_prompt_name="passage")
    encoder.encoding = encoding
    assert np.array_equal(encoder.encode("x"), encoder.encode("passage: x", prompt=""))


def test_stream_equals_encode(encoder, texts):
    drawn = []

    def source():
        for text in texts * 3:
            drawn.append(text)
            yield text

    stream = encoder.encode_stream(source(), block_size=10)
    first = next(stream)
    assert len(drawn) == 10  # no further than the block
    rows = np.stack([first, *stream])
    np.testing.assert_allclose(rows, encoder.encode(texts * 3), atol=1e-6)


def test_stream_names_a_bad_text_and_warns_once(encoder):
    with pytest.raises(TypeError, match="expected text 3 to be a string, got NoneType"):
        list(encoder.encode_stream(["a", "b", "c", None], block_size=2))
    with pytest.warns(TruncationWarning, match="2 texts were") as caught:
        assert len(list(encoder.encode_stream([LONG, "a", LONG + "b"], block_size=1))) == 3
    assert len(caught) == 1


def test_search_finds_the_nearest(encoder):
    corpus = ["a recipe for soup", "the stock market fell", "two dogs play in snow"]
    hits = encoder.search(["puppies in winter", "shares lost value"], corpus, top_k=2)
    assert [row[0]["corpus_id"] for row in hits] == [2, 1]
    vectors = encoder.encode(corpus)
    assert encoder.search("puppies in winter", vectors)[0][0]["corpus_id"] == 2
    assert encoder.search(vectors, vectors, top_k=1, metric="dot")[1][0]["corpus_id"] == 1


def test_similarity_uses_the_models_metric(encoder, texts):
    a, b = encoder.encode(texts[:2]), encoder.encode(texts[2:4])
    torch.testing.assert_close(encoder.similarity(a, b), torch.from_numpy(a @ b.T), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.similarity_pairwise(a, b, "dot"), torch.from_numpy((a * b).sum(1)))


def test_tokenize(encoder):
    tokens = encoder.tokenize(["hello world", "hi"])
    assert tokens["input_ids"].tolist() == [[101, 7592, 2088, 102], [101, 7632, 102, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert tokens["token_type_ids"].dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_stay_close(canonical_folder, encoder, texts, dtype):
    rows = minilm.load(canonical_folder, device="cpu", dtype=dtype).encode(texts)
    assert rows.dtype == np.float32
    limit = {"float16": 2e-5, "bfloat16": 2e-3, "float64": 1e-12}[dtype]  # of 1 - cosine, |a - b|² / 2
    assert (np.square(rows - encoder.encode(texts)).sum(axis=1) / 2).max() <= limit


def test_devices_and_dtypes_that_are_none(own_encoder):
    with pytest.raises(TypeError, match="expected one device"):
        own_encoder.encode("x", device=["cpu", "cpu"])
    with pytest.raises(ValueError, match="dtype must be a floating point type"):
        own_encoder.to("cpu", "int8")
    assert own_encoder.encode("x", device="cpu").shape == (384,)


def test_save_and_load(own_encoder, tmp_path, texts):
    own_encoder.max_seq_length = 64
    own_encoder.save(tmp_path / "mine")
    again = minilm.load(tmp_path / "mine", device="cpu")
    assert again.max_seq_length == 64
    assert again.fingerprint() == own_encoder.fingerprint()
    assert np.array_equal(again.encode(texts), own_encoder.encode(texts))


def test_fingerprint_sees_weights_and_settings(own_encoder, encoder):
    original = encoder.fingerprint()
    assert own_encoder.fingerprint() == original
    with torch.no_grad():
        own_encoder.model.layers[3].feed_forward.output.bias[7] += 1e-3
    assert own_encoder.fingerprint() != original


def test_a_model_in_training_encodes_without_dropout(own_encoder):
    own_encoder.model.train()
    assert np.array_equal(own_encoder.encode("x"), own_encoder.encode("x"))


@pytest.mark.parametrize("budget", [1, 10, 100])
def test_batches_hold_every_sequence_once_within_budget(budget):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 30]
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
