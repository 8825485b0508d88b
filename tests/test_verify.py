"""Golden vectors: right in themselves, and altered models are seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import minilm
from minilm.verify import GOLDEN_TEXTS, verify, with_golden
from minilm.weights.load import read_checkpoint


def test_the_default_model_verifies(encoder):
    report = verify(encoder)
    assert report.ok
    assert report.checks[0].name == "fingerprint"
    assert len(report.checks) == 1 + len(GOLDEN_TEXTS)


def test_shipped_golden_results_equal_transformers_in_float64(weights_folder):
    golden = read_checkpoint(weights_folder).golden
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights_folder)
    bert = transformers.BertModel.from_pretrained(weights_folder).double().eval()
    assert [expected["text"] for expected in golden] == list(GOLDEN_TEXTS)
    for expected in golden:
        inputs = tokenizer(expected["text"], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == expected["ids"]
        with torch.inference_mode():
            mean = bert(**inputs).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(expected["vector"], mean / mean.norm(), atol=1e-7)


def test_shipped_calibration_is_what_is_computed(weights_folder):
    checkpoint = read_checkpoint(weights_folder)
    torch.testing.assert_close(with_golden(checkpoint).calibration, checkpoint.calibration, atol=2e-6, rtol=0)


def test_calibration_is_not_that_of_another_pooling(canonical_folder):
    mean, cls = (minilm.load(canonical_folder, device="cpu", pooling=p).calibration for p in (None, "cls"))
    assert not torch.allclose(mean, cls, atol=1e-3)


@pytest.mark.parametrize("change", ["weights", "tokenizer", "nothing"])
def test_changes_are_seen(canonical_folder, change):
    checkpoint = read_checkpoint(canonical_folder)
    if change == "weights":
        bias = checkpoint.tensors["layers.5.feed_forward_norm.bias"]
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, "layers.5.feed_forward_norm.bias": bias + 1e-3})
    if change == "tokenizer":
        tokenizer = json.loads(checkpoint.tokenizer_json)
        tokenizer["normalizer"]["lowercase"] = False
        checkpoint = replace(checkpoint, tokenizer_json=json.dumps(tokenizer))
    report = verify(minilm.SentenceEncoder(checkpoint))
    assert report.ok == (change == "nothing")
    failed = {check.name for check in report.checks if not check.ok}
    assert ("fingerprint" in failed) == (change != "nothing")
    assert len(failed) > 1 or change == "nothing"
    assert any(line.startswith("FAIL fingerprint") for line in report.lines()) == (change != "nothing")


def test_golden_results_of_ones_own_model(canonical_folder, tmp_path):
    torch.manual_seed(0)
    config = minilm.MiniLMConfig(hidden_size=48, num_layers=2, num_heads=4, feed_forward_size=96)
    real, tensors = read_checkpoint(canonical_folder), minilm.MiniLM(config).state_dict()
    own = replace(real, config=config, tensors=tensors, golden=None, calibration=None)
    with_golden(own).save(tmp_path / "own")
    encoder = minilm.load(tmp_path / "own", device="cpu")
    assert verify(encoder).ok
    assert torch.equal(encoder.calibration, with_golden(own).calibration)


def test_nothing_to_check(canonical_folder):
    checkpoint = replace(read_checkpoint(canonical_folder), golden=None, stored_fingerprint=None)
    report = verify(minilm.SentenceEncoder(checkpoint))
    assert not report.ok
    assert "nothing to check" in report.lines()[0]
