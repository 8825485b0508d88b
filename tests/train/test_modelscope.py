"""ModelScope's fine-tuning example against recorded runs of ModelScope 1.40.2's own trainer, on the same weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import minilm
from minilm.train.log import read_log
from minilm.train.modelscope import Config, PassageBatches, Row, SentenceEmbeddingTrainer, Trainers, build_trainer
from minilm.train.rows import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
PROBE = ["how do bees make honey", "Honey is made by bees.", "Cars are fast."]
RUNS = {"avg_hard_nodrop": "train_rows_hard", "cls_nodrop": "train_rows"}


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(params=RUNS)
def run(request, weights_folder, tmp_path):
    """Train as the example does, on a ModelScope folder; give the trainer, the recorded run and its name."""
    recorded, rows = golden(f"train_{request.param}"), golden(RUNS[request.param])
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(weights_folder / "model.safetensors")
    tensors = {f"bert.{name}": tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    torch.save(tensors, folder / "pytorch_model.bin")
    config = json.loads((weights_folder / "config.json").read_text())
    config |= {"output_hidden_states": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(weights_folder / "vocab.txt", folder)
    after = recorded["cfg_after_modify"]
    before = {name: after[name] for name in ("framework", "task", "model", "pipeline")}
    schedule = {name: after["train"][name] for name in ("optimizer", "lr_scheduler")}
    before["train"] = {**schedule, "dataloader": {"batch_size_per_gpu": 1}, "max_epochs": 10}
    (folder / "configuration.json").write_text(json.dumps(before))

    def modify(cfg):
        cfg.task = "sentence-embedding"
        cfg["preprocessor"] = after["preprocessor"]
        cfg["dataset"] = after["dataset"]
        cfg["train"]["neg_samples"] = 4
        cfg["evaluation"] = {"dataloader": {"batch_size_per_gpu": 30}}
        cfg.train.max_epochs = 2
        cfg.train.train_batch_size = 4
        return cfg

    arguments = {"model": str(folder), "train_dataset": rows, "eval_dataset": rows, "work_dir": str(tmp_path / "work")}
    name = Trainers.nlp_sentence_embedding_trainer
    trainer = build_trainer(name=name, default_args={**arguments, "cfg_modify_fn": modify})
    before = trainer.evaluate()
    trainer.train()
    return trainer, recorded, request.param, before


def test_equals_the_recorded_run(run, tmp_path):
    trainer, recorded, name, before = run
    log, steps = read_log(tmp_path / "work" / "log.csv"), recorded["steps"]
    assert [row["step"] for row in log] == [step["iter"] + 1 for step in steps]
    assert [row["learning_rate"] for row in log] == pytest.approx([step["lr"][0] for step in steps], rel=1e-12)
    worst = max(abs(row["loss"] / step["loss"] - 1) for row, step in zip(log, steps, strict=True))
    norms = max(abs(r["gradient_norm"] / s["grad_norm_before_clip"] - 1) for r, s in zip(log, steps, strict=True))
    with np.load(GOLDEN / f"train_{name}_after.npz") as arrays:
        expected = arrays["text_embedding"]
    found = minilm.load(tmp_path / "work" / "output", device="cpu").encode(PROBE)
    vectors = (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
    print(f"{name}: losses {worst:.1e} (limit 1e-4), gradient norms {norms:.1e} (1e-4), vectors {vectors:.1e} (1e-5)")
    assert worst <= 1e-4
    assert norms <= 1e-4
    assert vectors <= 1e-5
    after = trainer.evaluate()
    assert {*after} == {"nDCG@10", "MRR@10", "MAP", "Recall@1", "Recall@5", "Recall@10"}
    assert after["Recall@10"] == 1.0  # no row has more passages
    assert after["MRR@10"] > before["MRR@10"] or before["MRR@10"] == 1.0


def test_evaluation_equals_a_count_by_hand(tiny_encoder):
    encoder = tiny_encoder(dropout=0.0, normalize=False)
    rows = [
        {"query": "the cat sees water",
         "positive_passages": [{"text": "a man eats bread"}, {"text": "some child finds water"}],
         "negative_passages": [{"text": "the cat sees water the cat"}, {"text": "an old bird"}]},
        {"query": "a woman likes bread", "positive_passages": [{"text": "a woman likes bread a stone"}],
         "negative_passages": [{"text": "the dog carries the red ball"}]},
    ]  # fmt: skip
    figures = SentenceEmbeddingTrainer(encoder, eval_dataset=rows, cfg_modify_fn=with_text).evaluate(recall_at=[1])
    reciprocal, recall = [], []
    for row in rows:
        passages = [p["text"] for p in (*row["positive_passages"], *row["negative_passages"])]
        scores = encoder.encode(passages) @ encoder.encode(row["query"])
        relevant = np.argsort(-scores) < len(row["positive_passages"])
        reciprocal.append(1 / (1 + relevant.argmax()))
        recall.append(relevant[0] / relevant.sum())
    assert figures["MRR@10"] == pytest.approx(np.mean(reciprocal))
    assert figures["Recall@1"] == pytest.approx(np.mean(recall))


def with_text(cfg):
    """Passages here have no titles."""
    cfg.dataset = {"train": {"text_fileds": ["text"]}}
    return cfg


ROWS = [
    Row(f"query {i}", (f"good {i}", f"also good {i}"), tuple(f"bad {i} {j}" for j in range(i + 1))) for i in range(7)
]


@pytest.mark.parametrize(("batch_size", "negatives"), [(2, 1), (3, 5)])
def test_batch_size_and_negatives_are_honoured(batch_size, negatives):
    batches = list(PassageBatches(ROWS, batch_size, negatives, seed=42))
    assert [len(batch.texts["query"]) for batch in batches] == [batch_size] * (7 // batch_size) + [1]
    assert sorted(query for batch in batches for query in batch.texts["query"]) == [row.query for row in ROWS]
    for batch in batches:
        for query, positive, drawn in zip(*(batch.texts[c] for c in ("query", "positive", "negatives")), strict=True):
            row = next(row for row in ROWS if row.query == query)
            assert positive in row.positives
            assert len(drawn) == negatives
            assert len(set(drawn)) == negatives or len(row.negatives) < negatives
            assert set(drawn) <= set(row.negatives)


def test_settings_reach_the_batches(tiny_encoder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minilm.train.modelscope.PassageBatches.__init__", lambda _, *given: seen.append(given) or 1 / 0
    )
    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}]}

    def modify(cfg):
        cfg["train"] = {"neg_samples": 7, "train_batch_size": 3, "dataloader": {"batch_size_per_gpu": 9}}
        return with_text(cfg)

    trainer = SentenceEmbeddingTrainer(tiny_encoder(), None, modify, [row], work_dir=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert seen[0][1:] == (3, 7, 42)


def test_the_order_goes_on_where_it_was():
    whole = PassageBatches(ROWS, 2, 2, seed=1)
    expected = [batch for _ in range(3) for batch in whole]
    first, second = PassageBatches(ROWS, 2, 2, seed=1), PassageBatches(ROWS, 2, 2, seed=5)
    taken = [next(iter(first)) for _ in range(5)]
    second.load_state_dict(first.state_dict())
    rest = [batch for _ in range(3) for batch in second][: len(expected) - 5]
    assert [batch.texts for batch in taken + rest] == [batch.texts for batch in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, "train_dataset, row 0: expected a text in 'query'"),
        ({"query": None}, "expected a text in 'query', got None"),
        ({"negative_passages": []}, r"expected a list of passages in 'negative_passages', got \[\]"),
        ({"positive_passages": "a text"}, "expected a list of passages in 'positive_passages', got 'a text'"),
        (
            {"positive_passages": [{"body": "x"}]},
            r"positive_passages: a passage lacks text \(see text_fileds\); it has body",
        ),
    ],
)
def test_bad_rows_are_named(change, message, tiny_encoder):
    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}], **change}
    with pytest.raises(DataError, match=message):
        SentenceEmbeddingTrainer(tiny_encoder(), train_dataset=[row], cfg_modify_fn=with_text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"type": "SGD"}}, "optimizer.type must be AdamW, got 'SGD'"),
        ({"lr_scheduler": {"type": "StepLR"}}, "lr_scheduler.type must be LinearLR, got 'StepLR'"),
        ({"neg_samples": 0}, "neg_samples must be at least 1"),
    ],
)
def test_settings_that_cannot_be_followed(change, message, tiny_encoder, tmp_path):
    def modify(cfg):
        cfg["train"] = change
        return with_text(cfg)

    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}]}
    trainer = SentenceEmbeddingTrainer(tiny_encoder(), None, modify, [row], work_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_nothing_to_do(tiny_encoder):
    trainer = SentenceEmbeddingTrainer(tiny_encoder())
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer.train()
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="expected 'nlp-sentence-embedding-trainer'"):
        build_trainer("another", {})


def test_configuration_is_nested_attributes():
    cfg = Config({"train": {"max_epochs": 1}})
    cfg.train.max_epochs = 3
    cfg["train"]["options"] = {"a": 1}
    assert cfg == {"train": {"max_epochs": 3, "options": {"a": 1}}}
    assert (cfg.train.options.a, cfg.find("train.options.b", 5), cfg.find("no.way", None)) == (1, 5, None)
    with pytest.raises(AttributeError, match="has no 'test'; it has train"):
        _ = cfg.test
