"""`SentenceEncoder`: forms in and out, options, cut texts, and a vector that depends on its text alone."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import minilm
from minilm.embed import TruncationWarning
from minilm.kernels.torch_backend import TorchBackend
from minilm.verify import verify

ODD_TEXTS = list(json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8")).values())
LONG = "one two three " * 100  # 302 tokens


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision must be one of float32, int8, uint8, binary, ubinary; got 'int4'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"truncate_dim": 385}, "truncate_dim must be at most 384, got 385"),
        ({"truncate_dim": 0}, "truncate_dim must be a positive integer"),
        ({"prompt_name": "title"}, "no prompt named 'title'; it has: document, query"),
        ({"output_value": "token_embeddings", "truncate_dim": 8}, "token embeddings come as they are"),
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


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ("abc", {}, TypeError, "expected an iterable of strings, got one string"),
        (None, {}, TypeError, "got NoneType"),
        ({"text": 1}, {}, TypeError, "got dict"),
        (["a"], {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        (["a"], {"precision": "int4"}, ValueError, "precision must be one of"),
        (["a"], {"convert_to_tensor": True}, TypeError, "encode_stream has no option convert_to_tensor"),
    ],
)
def test_stream_refuses_at_once(encoder, inputs, options, error, message):
    with pytest.raises(error, match=message):
        encoder.encode_stream(inputs, **options)


def test_stream_names_a_bad_text_and_warns_once(encoder):
    with pytest.raises(TypeError, match="expected text 3 to be a string, got NoneType"):
        list(encoder.encode_stream(["a", "b", "c", None], block_size=2))
    with pytest.warns(TruncationWarning, match="2 texts were") as caught:
        assert len(list(encoder.encode_stream([LONG, "a", LONG + "b"], block_size=1))) == 3
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("show", "level", "drawn"), [(True, 30, True), (False, 10, False), (None, 20, True), (None, 30, False)]
)
def test_progress_bar(encoder, texts, caplog, capsys, show, level, drawn):
    with caplog.at_level(level, logger="minilm"):
        encoder.encode(texts, show_progress_bar=show)
        assert ("24/24" in capsys.readouterr().err) == drawn
        list(encoder.encode_stream(texts, show_progress_bar=show, block_size=7))
        assert ("24text" in capsys.readouterr().err) == drawn


def test_a_prompt_is_checked_like_a_text(encoder):
    with pytest.raises(TypeError, match="expected prompt to be a string, got int"):
        encoder.encode("x", prompt=3)
    with pytest.raises(ValueError, match="prompt is not valid Unicode: lone surrogate"):
        encoder.encode("x", prompt="\ud800")


def test_queries_and_documents_take_encodes_arguments(encoder, texts):
    for encode in (encoder.encode_query, encoder.encode_document):
        np.testing.assert_array_equal(encode(texts, None, "p: ", 8), encoder.encode(texts, None, "p: ", 8))
        np.testing.assert_array_equal(encode(texts, prompt_name="query"), encoder.encode(texts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(encoder, texts, dtype):
    expected = encoder.encode(texts)
    torch.set_default_dtype(dtype)
    try:
        assert np.array_equal(encoder.encode(texts), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_error_in_the_callers_generator_comes_out(encoder):
    def source():
        yield "a"
        raise TypeError("boom")

    with pytest.raises(TypeError, match=r"^boom$"):
        encoder.encode(source())


def test_padded_or_packed(encoder, texts):
    """Vectors pooled from a padded batch that someone brings equal `encode`'s."""
    tokens = encoder.tokenize(texts)
    batch = minilm.PackedBatch.from_padded(tokens["input_ids"], tokens["attention_mask"])
    with torch.inference_mode():
        states = encoder.model(batch, hidden_states=True).hidden_states
        rows = torch.nn.functional.normalize(encoder.model.backend.pool(states, batch, "mean"), dim=-1)
    assert np.abs(rows.numpy() - encoder.encode(texts)).max() <= 1e-6


def test_search_finds_the_nearest(encoder):
    corpus = ["a recipe for soup", "the stock market fell", "two dogs play in snow"]
    hits = encoder.search(["puppies in winter", "shares lost value"], corpus, top_k=2)
    assert [row[0]["corpus_id"] for row in hits] == [2, 1]
    vectors = encoder.encode(corpus)
    assert encoder.search("puppies in winter", vectors)[0][0]["corpus_id"] == 2
    assert encoder.search(vectors, vectors, top_k=1, metric="dot")[1][0]["corpus_id"] == 1
    scores = [hit["score"] for hit in encoder.search(vectors[0], vectors)[0]]
    np.testing.assert_allclose(scores, np.sort(vectors @ vectors[0])[::-1], atol=1e-6)  # by cosine, the model's metric


def test_similarity_uses_the_models_metric(encoder, texts):
    a, b = encoder.encode(texts[:2]), encoder.encode(texts[2:4])
    torch.testing.assert_close(encoder.similarity(a, b), torch.from_numpy(a @ b.T), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.similarity_pairwise(a, b, "dot"), torch.from_numpy((a * b).sum(1)))


def test_tokenize(encoder):
    tokens = encoder.tokenize(["hello world", "hi"])
    assert tokens["input_ids"].tolist() == [[101, 7592, 2088, 102], [101, 7632, 102, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert tokens["token_type_ids"].dtype == torch.int64
    assert encoder.tokenize([])["input_ids"].shape == (0, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_stay_close(canonical_folder, encoder, texts, dtype):
    rows = minilm.load(canonical_folder, device="cpu", dtype=dtype).encode(texts)
    assert rows.dtype == np.float32
    limit = {"float16": 2e-5, "bfloat16": 2e-3, "float64": 1e-12}[dtype]  # of 1 - cosine, |a - b|² / 2
    assert (np.square(rows - encoder.encode(texts)).sum(axis=1) / 2).max() <= limit


def test_devices_and_dtypes_that_are_none(own_encoder):
    with pytest.raises(TypeError, match="expected one device"):
        own_encoder.encode("x", device=["cpu", "cpu"])
    for dtype in ("int8", "float99"):
        with pytest.raises(ValueError, match=f"dtype must be a floating point type.* got '{dtype}'"):
            own_encoder.to("cpu", dtype)
    for device in ("toaster", "cpu,cpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' can't be used here"):
            own_encoder.to(device)
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


@pytest.mark.parametrize("change", ["weights", "pooling", "nothing"])
def test_saving_a_changed_model_drops_the_results_of_the_old_one(canonical_folder, tmp_path, change):
    encoder = minilm.load(canonical_folder, device="cpu", pooling="cls" if change == "pooling" else None)
    if change == "weights":
        with torch.no_grad():
            encoder.model.embeddings.word.weight *= 1.01
    saved = minilm.load(encoder.save(tmp_path / "changed"), device="cpu")
    assert verify(saved).ok
    assert (saved.checkpoint.golden is None) == (change != "nothing")
    assert (saved.checkpoint.calibration is None) == (change != "nothing")


def test_a_backend_is_made_on_a_real_device(canonical_folder):
    class Keeper(TorchBackend):
        def __init__(self, config):
            super().__init__(config)
            self.ones = torch.ones(3)

    assert minilm.load(canonical_folder, device="cpu", backend=Keeper).model.backend.ones.sum() == 3


def test_tokenizing_leaves_training_mode(own_encoder):
    own_encoder.model.train()
    own_encoder.tokenize(["x"])
    assert own_encoder.model.training
