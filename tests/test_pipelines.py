"""The pipeline against recorded outputs of ModelScope 1.40.2, on the same weights, case by case.

Embeddings may differ from the recorded ones by 2e-6 of their length (the norm of the difference), scores by 2e-6 of
the product of the two lengths.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minilm import pipeline
from minilm.pipelines import TASK

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-6


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


INPUTS = golden("inference_inputs.json")["cases"]
INPUTS["ERR_source_tuple"]["source_sentence"] = tuple(INPUTS["ERR_source_tuple"]["source_sentence"])  # JSON has none
INPUTS["ERR_tuple_input"] = tuple(INPUTS["ERR_tuple_input"])
TOKENS = golden("tokens_fast.json")
POOLERS = ("avg", "cls")
RESULTS = {pooler: golden(f"inference_{pooler}.json")["results"] for pooler in POOLERS}
ANSWERED = [case for case, result in RESULTS["avg"].items() if "error" not in result]

# What the reference fails on: here a plain string is one sentence, and the rest is an error that says what is wrong.
PLAIN_STRINGS = {
    "str_source_only": 1,
    "str_source_list_compare": 2,
    "str_source_str_compare": 2,
    "ERR_source_empty_str": 1,
    "ERR_str_compare_empty": 2,
}
ERRORS = {
    "ERR_bare_string": (TypeError, r'expected {"source_sentence": \["a text", ...\], .*; got str$'),
    "ERR_list_of_strings": (TypeError, r"expected {.* got str in the list"),
    "ERR_tuple_input": (TypeError, r"expected {.* got tuple$"),
    "ERR_none_input": (TypeError, r"expected {.* got NoneType$"),
    "ERR_empty_dict": (ValueError, "no source_sentence; expected {"),
    "ERR_no_source": (ValueError, "no source_sentence; expected {"),
    "ERR_source_none": (ValueError, "no source_sentence; expected {"),
    "ERR_source_empty_list": (ValueError, "source_sentence is an empty list"),
    "ERR_source_empty_list_cmp": (ValueError, "source_sentence is an empty list"),
    "ERR_source_int": (TypeError, r"in source_sentence: expected text 0 to be a string, got int \(1\)"),
    "ERR_source_none_elem": (TypeError, "in source_sentence: expected text 0 to be a string, got NoneType"),
    "ERR_source_tuple": (TypeError, "source_sentence must be a string or a list of strings, got tuple"),
}


@pytest.fixture(scope="module")
def modelscope_folder(weights_folder, tmp_path_factory):
    """Return a function that lays the weights out as ModelScope does, for a given pooler."""

    def make(pooler):
        folder = tmp_path_factory.mktemp(pooler)
        tensors = load_file(weights_folder / "model.safetensors")
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
        torch.save(tensors, folder / "pytorch_model.bin")
        config = json.loads((weights_folder / "config.json").read_text()) | {"output_hidden_states": True}
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(weights_folder / "vocab.txt", folder)
        configuration = golden(f"inference_{pooler}.json")["configuration"]
        (folder / "configuration.json").write_text(json.dumps(configuration))
        return folder

    return make


@pytest.fixture(scope="module", params=POOLERS)
def reference(request, modelscope_folder):
    """Give a pipeline, the recorded results and the recorded arrays of one pooler."""
    with np.load(GOLDEN / f"inference_{request.param}.npz") as arrays:
        recorded = dict(arrays)
    return pipeline(TASK, modelscope_folder(request.param)), RESULTS[request.param], recorded


@pytest.fixture(scope="module")
def embed(encoder):
    return pipeline(model=encoder)


def is_close(given, expected):
    """Say whether vectors are as close as the module's docstring states."""
    differences = np.linalg.norm(given - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print(f"ModelScope's vectors, relative to their length: {differences.max():.1e} (limit {TOLERANCE:.0e})")
    return bool((differences <= TOLERANCE).all())


def test_every_case_is_tested():
    assert {*ANSWERED, *PLAIN_STRINGS, *ERRORS} == set(INPUTS)
    assert not {*PLAIN_STRINGS, *ERRORS} & set(ANSWERED)


@pytest.mark.filterwarnings("ignore::minilm.embed.TruncationWarning")
@pytest.mark.parametrize("case", ANSWERED)
def test_equals_reference(reference, case):
    run, results, recorded = reference
    output = run(INPUTS[case])
    assert type(output).__name__ == results[case]["returned"]
    items = output if isinstance(output, list) else [output]
    assert len(items) == len(results[case]["items"])
    for item, expected in zip(items, results[case]["items"], strict=True):
        rows = recorded[expected["npz_key"]]
        assert list(item) == expected["keys"]
        assert item["text_embedding"].shape == rows.shape
        assert item["text_embedding"].dtype == np.float32
        assert is_close(item["text_embedding"], rows)
        assert [type(score) for score in item["scores"]] == [float] * len(expected["scores"])
        lengths = np.linalg.norm(rows, axis=1)
        unit = lengths[0] * lengths[1:][: len(expected["scores"])]
        differences = np.abs(np.subtract(item["scores"], expected["scores"])) / unit
        print(f"ModelScope's scores, relative to the lengths: {differences.max(initial=0):.1e} (limit {TOLERANCE:.0e})")
        assert (differences <= TOLERANCE).all()


@pytest.mark.parametrize("case", [case for case, tokens in TOKENS.items() if tokens])
def test_tokens_equal_reference(embed, case):
    tokenizer = embed.encoder.tokenizer
    for field, part in (("source_sentence", "query"), ("sentences_to_compare", "docs")):
        texts = INPUTS[case].get(field) or []
        expected = TOKENS[case].get(part, {"input_ids": [], "token_type_ids": [], "attention_mask": []})
        assert len(texts) == len(expected["input_ids"])
        for index, text in enumerate(texts):
            real = np.array(expected["attention_mask"][index], dtype=bool)
            tokenized = tokenizer.truncate(tokenizer(text), 128)
            assert tokenized.ids == np.array(expected["input_ids"][index])[real].tolist()
            assert tokenized.type_ids == np.array(expected["token_type_ids"][index])[real].tolist()


@pytest.mark.parametrize(("case", "rows"), PLAIN_STRINGS.items(), ids=PLAIN_STRINGS)
def test_plain_string_is_one_sentence(embed, case, rows):
    as_lists = {name: [value] if isinstance(value, str) else value for name, value in INPUTS[case].items()}
    output, expected = embed(INPUTS[case]), embed(as_lists)
    assert output["text_embedding"].shape == (rows, 384)
    assert np.array_equal(output["text_embedding"], expected["text_embedding"])
    assert output["scores"] == expected["scores"]
    assert len(output["scores"]) == rows - 1


@pytest.mark.parametrize(("case", "error"), ERRORS.items(), ids=ERRORS)
def test_error_says_what_is_wrong(embed, case, error):
    with pytest.raises(error[0], match=error[1]):
        embed(INPUTS[case])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([["one", "uno", "ein"]], ValueError, "in source_sentence: expected text 0 to be .* got 3 elements"),
        (["fine", ["one", 2]], TypeError, "the second half of text 1 to be a string, got int"),
        ([b"bytes"], TypeError, "decode it first"),
        (["\ud800"], ValueError, "in source_sentence: text 0 is not valid Unicode"),
        ({"a"}, TypeError, "source_sentence must be a string or a list of strings, got set"),
        (7, TypeError, "source_sentence must be a string or a list of strings, got int"),
    ],
    ids=["triple", "half_a_pair", "bytes", "surrogate", "set", "int"],
)
def test_more_errors(embed, source, error, message):
    with pytest.raises(error, match=message):
        embed({"source_sentence": source})
    with pytest.raises(error, match=message.replace("source_sentence", "sentences_to_compare")):
        embed([{"source_sentence": "x"}, {"source_sentence": "x", "sentences_to_compare": source}])


@pytest.mark.parametrize("option", ["max_length", "sequence_length"])
def test_length_limit(canonical_folder, embed, option):
    short = pipeline(model=canonical_folder, **{option: 5})
    with pytest.warns(UserWarning, match="longer than 5 tokens"):
        rows = short({"source_sentence": ["a man is eating food", "a man is"]})["text_embedding"]
    assert is_close(rows[0], embed({"source_sentence": "a man is"})["text_embedding"][0])
    assert is_close(rows[1], rows[0])


def test_batch_size_changes_nothing(embed):
    inputs = {"source_sentence": [f"{'word ' * n}" for n in range(1, 9)]}
    one_by_one = embed(inputs, batch_size=1)["text_embedding"]
    assert is_close(embed(inputs, batch_size=64)["text_embedding"], one_by_one)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((), {"model": "FOLDER"}), ((TASK,), {"model": "FOLDER"}), ((TASK, "FOLDER"), {}), (("FOLDER",), {})],
    ids=["keyword", "task_and_keyword", "both_positional", "model_alone"],
)
def test_ways_to_name_the_model(canonical_folder, arguments, options):
    arguments = [str(canonical_folder) if value == "FOLDER" else value for value in arguments]
    options = {name: str(canonical_folder) for name in options}
    assert pipeline(*arguments, **options).encoder.config.hidden_size == 384


def test_refused_options(canonical_folder, encoder):
    with pytest.raises(ValueError, match="the task must be 'sentence-embedding', got 'text-ranking'"):
        pipeline("text-ranking", model=canonical_folder)
    with pytest.raises(ValueError, match="same limit, got 5 and 6"):
        pipeline(model=canonical_folder, max_length=5, sequence_length=6)
    with pytest.raises(ValueError, match=r"loaded already; give device, pooling to minilm.load"):
        pipeline(model=encoder, device="cpu", pooling="cls")


@pytest.mark.parametrize(("device", "expected"), [("gpu", "cuda"), ("gpu:1", "cuda:1"), ("cpu", "cpu"), (None, None)])
def test_device_names_where_there_is_cuda(monkeypatch, device, expected):
    loaded = []
    monkeypatch.setattr("minilm.pipelines.load", lambda *_, **options: loaded.append(options["device"]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    pipeline(device=device)
    assert loaded == [expected]


def test_gpu_without_cuda_is_the_cpu_and_says_so(monkeypatch, canonical_folder, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "minilm"):
        assert pipeline(model=canonical_folder, device="gpu").encoder.device.type == "cpu"
    assert "device 'gpu' was asked for and there is no CUDA device; using the CPU" in caplog.text
