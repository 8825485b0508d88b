"""`minilm weights`: there and back again, and verification that fails when it should."""

import json
from dataclasses import replace

import numpy as np

import minilm
from minilm.cli import main


def test_weights_convert_export_inspect_verify(tmp_path, capsys, weights_folder, encoder):
    converted, exported, back = (str(tmp_path / name) for name in ("converted", "exported", "back"))
    assert main(["weights", "convert", str(weights_folder), converted, "--max-seq-length", "64"]) == 0
    assert main(["weights", "verify", converted]) == 0
    assert main(["weights", "export", converted, exported, "--to", "sentence-transformers"]) == 0
    assert main(["weights", "convert", exported, back]) == 0
    capsys.readouterr()
    assert main(["weights", "inspect", back, "--json", "--tensors"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["provenance"]["source_max_seq_length"] == 64
    assert report["tensors"]["embeddings.word.weight"] == ["torch.float32", 30522, 384]
    assert report["golden_texts"] > 0
    assert main(["weights", "inspect", str(weights_folder)]) == 0
    assert encoder.fingerprint() in capsys.readouterr().out
    assert np.array_equal(minilm.load(back).encode("a cat"), encoder.encode("a cat"))


def test_weights_export_to_modelscope(tmp_path, canonical_folder, encoder):
    assert main(["weights", "export", str(canonical_folder), str(tmp_path / "exported"), "--to", "modelscope"]) == 0
    assert np.array_equal(minilm.load(tmp_path / "exported").encode("a cat"), encoder.encode("a cat"))


def test_what_was_found_by_name_is_shown_by_name(capsys, sources, weights_folder):
    snapshot = sources.cache_snapshot(weights_folder)
    assert main(["weights", "inspect", "all-MiniLM-L6-v2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["provenance"]["source"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert report["folder"] == str(snapshot)


def test_weights_fetch_prints_the_folder(capsys, canonical_folder):
    assert main(["weights", "fetch", str(canonical_folder)]) == 0
    assert capsys.readouterr().out == f"{canonical_folder}\n"


def test_a_card_of_what_was_measured_travels_with_the_weights(tmp_path, capsys, canonical_folder):
    folder, stsb, scores, facts = (tmp_path / name for name in ("model", "sts/stsb", "sts.json", "facts.toml"))
    assert main(["weights", "convert", str(canonical_folder), str(folder), "--precision", "float16"]) == 0
    stsb.mkdir(parents=True)
    pairs = [("A cat sits.", "A cat is sitting."), ("A cat sits.", "Dogs bark."), ("It rains.", "It is raining hard.")]
    lines = (f"{score}\t{first}\t{second}\n" for score, (first, second) in zip((5, 1, 4), pairs, strict=True))
    (stsb / "test.tsv").write_text("".join(lines))
    measure = ["--data", str(stsb.parent), "--tasks", "stsb", "--samples", "20", "--device", "cpu"]
    assert main(["eval", "sts", "--model", str(folder), *measure, "--json", str(scores)]) == 0
    facts.write_text('name = "mine"\n[[teachers]]\nname = "somebody/else"\nlicence = "MIT"\n')
    options = ["--facts", str(facts), "--scores", str(scores)]
    capsys.readouterr()
    assert main(["weights", "card", str(folder), *options]) == 0
    card = capsys.readouterr().out
    assert "\n# mine\n" in card
    assert "| somebody/else | MIT |" in card
    assert f"| average | {json.loads(scores.read_text())['figures']['average']:.1f} |" in card
    assert main(["weights", "card", str(folder), *options, "-o", str(folder / "README.md")]) == 0
    exported, copy, smaller = (str(tmp_path / name) for name in ("exported", "copy", "smaller"))
    assert main(["weights", "export", str(folder), exported, "--to", "sentence-transformers"]) == 0
    assert main(["weights", "convert", str(folder), copy]) == 0
    assert (tmp_path / "exported" / "README.md").read_text() == card
    assert (tmp_path / "copy" / "README.md").read_text() == card
    assert main(["weights", "convert", str(folder), smaller, "--precision", "int8"]) == 0
    assert not (tmp_path / "smaller" / "README.md").exists()
    assert main(["weights", "card", smaller, *options]) == 2
    assert "expected sts scores of the model with fingerprint" in capsys.readouterr().err


def test_card_of_files_that_are_not_there_or_not_facts(tmp_path, capsys, canonical_folder):
    (tmp_path / "facts.toml").write_text("name = ")
    for facts, message in (("nowhere.toml", "there is no file"), ("facts.toml", "facts.toml is not TOML")):
        assert main(["weights", "card", str(canonical_folder), "--facts", str(tmp_path / facts)]) == 2
        assert message in capsys.readouterr().err


def test_failed_verification_is_exit_code_1(tmp_path, capsys, canonical_folder):
    checkpoint = minilm.load(canonical_folder).to_checkpoint()
    golden = [{"text": "a cat", "ids": [101, 1037, 4937, 102], "vector": [1.0] * 384}]
    replace(checkpoint, golden=golden).save(tmp_path / "model")
    assert main(["weights", "verify", str(tmp_path / "model")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_weights_rounded_to_half_the_size(tmp_path, capsys, canonical_folder, encoder):
    folder = tmp_path / "half"
    assert main(["weights", "convert", str(canonical_folder), str(folder), "--precision", "float16"]) == 0
    assert main(["weights", "verify", str(folder)]) == 0
    assert (folder / "model.safetensors").stat().st_size < 46e6
    ours, exact = minilm.load(folder, device="cpu").encode("a cat"), encoder.encode("a cat")
    assert 1e-6 < np.abs(ours - exact).max() < 1e-3
    capsys.readouterr()
    assert main(["weights", "convert", str(canonical_folder), str(folder), "--precision", "int4"]) == 2
    assert "floating point type such as" in capsys.readouterr().err


def test_weights_rounded_to_a_quarter_of_the_size(tmp_path, capsys, canonical_folder):
    folder = tmp_path / "quarter"
    assert main(["weights", "convert", str(canonical_folder), str(folder), "--precision", "int8"]) == 0
    assert (folder / "model.safetensors").stat().st_size < 23.2e6
    assert main(["weights", "verify", str(folder)]) == 0
    capsys.readouterr()
    assert main(["weights", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtypes"] == ["float32", "int8"]
