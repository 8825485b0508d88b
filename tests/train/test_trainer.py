"""The training loop and what it is made of."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import minilm
from minilm import MiniLMConfig
from minilm.kernels.torch_backend import TorchBackend
from minilm.train import contiguous
from minilm.train.contiguous import ContiguousBackend, training_backend
from minilm.train.distillation import HPD, MSE, IBKDFineTuning
from minilm.train.gradients import Gradients, TrainingError
from minilm.train.log import read_log
from minilm.train.objectives import Contrastive, Objective, UnsupervisedSimCSE
from minilm.train.optimization import MovingAverage, adamw, schedule_factor
from minilm.train.settings import TrainingSettings
from minilm.train.states import Layout, StatePooler
from minilm.train.trainer import Trainer
from minilm.weights.sources import read_model

PAIRS = {"hard_negatives": False}


# From texts to states.


def test_states_are_the_encoders_own(tiny_encoder):
    encoder = tiny_encoder(dropout=0.0, pooling="cls")
    texts = ["the cat sees water", "a man", "an old bird finds a very long green rope", "a man"]
    pooler = StatePooler(encoder, ("embedding", "unnormalized", "layer.0", "layer.1", "layer.2"))
    batches, places = pooler.pack(texts, 12)
    assert len(batches) > 1
    with torch.no_grad():
        states = torch.cat([pooler(batch) for batch in batches])[places]
        hidden = [
            encoder.model(minilm.PackedBatch.from_sequences([encoder.tokenizer(text).ids]), hidden_states=True)
            for text in texts
        ]
    np.testing.assert_allclose(states[:, 0], encoder.encode(texts), atol=1e-6)
    for i, output in enumerate(hidden):
        torch.testing.assert_close(states[i, 1], output.last_hidden_state[0])
        for layer in range(3):
            torch.testing.assert_close(states[i, 2 + layer], output.hidden_states[layer].mean(dim=0))


@pytest.mark.parametrize("name", ["layer.3", "layer.", "pooled"])
def test_unknown_states(name, tiny_encoder):
    with pytest.raises(ValueError, match=f"expected a state .* layer.0 to layer.2, got '{name}'"):
        StatePooler(tiny_encoder(), (name,))


def test_layout_brings_texts_back_to_their_columns():
    layout = Layout.of({"query": ["a", "b"], "negatives": [["c", "d", "e"], ["f", "g", "h"]]})
    assert layout.texts == list("abcdefgh")
    states = torch.arange(8.0).view(8, 1, 1).expand(8, 2, 3) + torch.tensor([0, 100]).view(1, 2, 1)
    columns = layout.columns(states, ["x", "y"])
    assert columns["query"]["y"][:, 0].tolist() == [100, 101]
    assert columns["negatives"]["x"][:, :, 0].tolist() == [[2, 3, 4], [5, 6, 7]]
    assert Layout.of({"text": ["a", "b"]}, views=2).texts == ["a", "a", "b", "b"]


@pytest.mark.parametrize("column", [[["a"], ["b", "c"]], [["a"], "b"]])
def test_ragged_columns(column):
    with pytest.raises(ValueError, match="column 'negatives' must hold as many texts in each row"):
        Layout.of({"negatives": column})


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len", "avg_top2", "avg_first_last"])
def test_contiguous_backend_equals_plain_torch(pooling, tiny_encoder):
    encoder = tiny_encoder(dropout=0.0, pooling=pooling)
    batches, _ = StatePooler(encoder, ()).pack(
        ["a man", "the cat", "water", "the dog eats bread", "an old bird sees water"]
    )
    results = []
    for backend in (TorchBackend, ContiguousBackend):
        encoder.model.zero_grad()
        with encoder.model.use_backend(backend):
            states = StatePooler(encoder, ("embedding", "layer.1"))(batches[0])
            states.square().mul(torch.linspace(1, 2, 32)).sum().backward()
        results.append((states.detach(), [p.grad for p in encoder.model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)


def test_a_gpu_without_the_kernels_says_why(monkeypatch, caplog):
    config = MiniLMConfig(attention_dropout=0.1)
    assert training_backend(config, "cpu") is ContiguousBackend
    assert not caplog.records
    assert training_backend(config, "cuda") is ContiguousBackend
    assert "without the kernels, in plain torch: they leave out attention dropout" in caplog.text
    monkeypatch.setitem(contiguous.AUTOMATIC, "cuda", "no_such_module:Backend")
    assert training_backend(replace(config, attention_dropout=0.0), "cuda") is ContiguousBackend
    assert "no_such_module" in caplog.records[-1].getMessage()


def test_views_differ_by_dropout_alone(tiny_encoder, make_rows):
    class Seen(UnsupervisedSimCSE):
        def loss(self, texts, targets):
            self.vectors = texts["text"]["embedding"].detach()
            return super().loss(texts, targets)

    batch, settings = next(iter(make_rows())), TrainingSettings("unused")
    for dropout, same in ((0.1, False), (0.0, True)):
        objective = Seen()
        Gradients(tiny_encoder(dropout=dropout), objective, settings).add(batch, 0)
        first, second = objective.vectors.unbind(1)
        assert torch.allclose(first, second, atol=1e-6) == same


# Gradients.


def test_early_states_and_objective_get_gradients(tiny_encoder, make_rows):
    encoder = tiny_encoder(dropout=0.0)
    objective = IBKDFineTuning(32, 8, early_state="layer.0", hsic_weight=1e3)
    Gradients(encoder, objective, TrainingSettings("unused")).add(next(iter(make_rows(negatives=1))), 0)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    with_early = encoder.model.embeddings.word.weight.grad.clone()
    encoder.model.zero_grad()
    objective.hsic_weight = 0.0
    Gradients(encoder, objective, TrainingSettings("unused")).add(next(iter(make_rows(negatives=1))), 0)
    assert not torch.allclose(with_early, encoder.model.embeddings.word.weight.grad)


def test_dropout_depends_on_seed_and_number_alone(tiny_encoder, make_rows):
    encoder, batch = tiny_encoder(), next(iter(make_rows()))

    def loss(number, seed):
        torch.rand(3)  # the process's own random numbers don't matter
        return float(
            Gradients(encoder, Contrastive(0.1, **PAIRS), TrainingSettings("unused", seed=seed)).add(batch, number)
        )

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_the_process_random_state_is_left_alone(train):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train(epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_accumulated_batches_are_averaged(tiny_encoder, make_rows, tmp_path):
    """Two batches of three rows against one of six, for a loss that is a mean over rows."""
    states = []
    rows = [next(iter(make_rows(batch_size=6)))]
    halves = [type(rows[0])({"text": rows[0].texts["text"][s]}, {"teacher": rows[0].targets["teacher"][s]}, 3)
              for s in (slice(3), slice(3, 6))]  # fmt: skip
    for data in (rows, halves):

        class Given(list):
            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                """There is none."""

        torch.manual_seed(0)
        settings = TrainingSettings(
            str(tmp_path / str(len(data))), accumulation=len(data), plot=False, learning_rate=1e-3
        )
        trainer = Trainer(tiny_encoder(dropout=0.0), MSE(32, 8), Given(data), settings)
        trainer.run()
        states.append((trainer.last_loss, trainer.last_gradient_norm))
    assert states[0] == pytest.approx(states[1], rel=1e-5)


# The loop.


def test_it_learns(train, make_rows):
    trainer, result = train(epochs=30, schedule="cosine")
    losses = [row["loss"] for row in read_log(result.model.parent / "log.csv")]
    assert len(losses) == result.steps == 150
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    loaded = minilm.load(result.model, device="cpu")
    texts = next(iter(make_rows())).texts["text"]
    np.testing.assert_array_equal(loaded.encode(texts), trainer.encoder.encode(texts))
    assert loaded.checkpoint.provenance["training"]["step"] == 150
    assert loaded.checkpoint.provenance["source"] == "trained from unknown weights"


def test_what_is_trained_again_says_where_it_began(train):
    _, first = train(max_steps=1)
    _, second = train(minilm.load(first.model, device="cpu", dtype="float32"), max_steps=1, name="again")
    assert read_model(second.model).provenance["source"] == "trained from unknown weights"


def test_one_step_equals_torchs_own(tiny_encoder, make_rows, train):
    """AdamW, clipping and decay, written out from the papers."""
    encoder = tiny_encoder(dropout=0.0)
    reference = copy.deepcopy(encoder.model)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    trainer, _ = train(encoder, max_steps=1, warmup=0, weight_decay=0.1, max_gradient_norm=0.5, learning_rate=1e-2)
    twin = tiny_encoder(dropout=0.0)
    Gradients(twin, Contrastive(0.1, **PAIRS), TrainingSettings("unused")).add(next(iter(make_rows())), 0)
    gradients = {name: p.grad for name, p in twin.model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert trainer.last_gradient_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in trainer.encoder.model.named_parameters():
        clipped = gradients[name] * min(1, 0.5 / norm)
        decayed = start[name] * (1 - 1e-2 * 0.1 * (parameter.dim() > 1))
        expected = decayed - 1e-2 * clipped / (clipped.abs() + 1e-8)  # the first step: both moments unbiased
        large = clipped.abs() > 1e-6  # elsewhere rounding decides the sign
        torch.testing.assert_close(parameter[large], expected[large], atol=1e-5, rtol=1e-4)


def test_best_is_kept_and_scored(train):
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2])
    trainer, result = train(epochs=4, evaluate_every=5, evaluate=lambda _: next(scores))
    assert (result.first_score, result.score, result.best_step, result.steps) == (0.1, 0.9, 10, 20)
    log = read_log(result.model.parent / "log.csv")
    assert [(row["step"], row["score"]) for row in log if not math.isnan(row["score"])] == [
        *((0, 0.1), (5, 0.5), (10, 0.9), (15, 0.3), (20, 0.2)),
    ]
    ten, _ = train(name="ten", epochs=4, evaluate_every=0)
    assert not torch.equal(
        trainer.encoder.model.layers[0].attention.qkv.weight, ten.encoder.model.layers[0].attention.qkv.weight
    )


def test_last_is_kept_if_asked_for(train):
    scores = iter([0.1, 0.9, 0.3, 0.3])
    trainer, result = train(epochs=2, evaluate_every=5, evaluate=lambda _: next(scores), keep_best=False)
    assert (result.score, result.best_step) == (0.3, 10)
    other, _ = train(name="other", epochs=2)
    for ours, theirs in zip(trainer.encoder.model.parameters(), other.encoder.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # evaluation changes nothing


def test_the_average_is_what_is_evaluated_and_kept(train):
    seen = []
    trainer, _ = train(epochs=2, ema=0.5, evaluate_every=10, evaluate=lambda e: seen.append(weight(e)) or 1.0)
    assert torch.equal(seen[-1], weight(trainer.encoder))
    assert torch.equal(seen[-1], trainer.average.average["layers.0.attention.qkv.weight"])
    plain, _ = train(name="plain", epochs=2)
    assert not torch.allclose(weight(plain.encoder), seen[-1])


def weight(encoder):
    return encoder.model.layers[0].attention.qkv.weight.detach().clone()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_an_output_layer_is_evaluated_and_becomes_the_models(train, ema):
    seen = []
    objective, texts = HPD(32, 8, output_width=4), ["the cat sees water", "a man"]
    trainer, result = train(
        None, objective, lambda e: seen.append(e.encode(texts)) or len(seen), epochs=2, evaluate_every=5, ema=ema
    )
    loaded = minilm.load(result.model, device="cpu")
    assert loaded.encode(texts).shape == (2, 4)
    np.testing.assert_array_equal(loaded.encode(texts), seen[-1])
    np.testing.assert_array_equal(loaded.encode(texts), trainer.encoder.encode(texts))
    assert torch.equal(loaded.model.output_layer.weight, objective.output_layer.weight)
    assert trainer.run() == result  # a run that has ended
    np.testing.assert_array_equal(loaded.encode(texts), trainer.encoder.encode(texts))
    with pytest.raises(ValueError, match=r"has an output layer.*; take it away with encoder.model.output_layer = None"):
        train(loaded)


def test_moving_average_by_hand():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average, expected = MovingAverage(module, 0.9), 0.0
    for step in range(1, 30):
        nn.init.constant_(module.weight, step)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == 29


def test_schedules():
    linear = [schedule_factor(step, 10, 4, "linear") for step in range(10)]
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [schedule_factor(step, 8, 0, "cosine") for step in range(8)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert {schedule_factor(step, 8, 0, "constant") for step in range(8)} == {1.0}
    assert TrainingSettings("x", warmup=0.25).warmup_steps(40) == 10
    assert TrainingSettings("x", warmup=3).warmup_steps(40) == 3


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = adamw({module: 0.1}, 0.01).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.01), (3, 0.0)]
    (group,) = adamw({module: 0.1}, 0.01, decay_all=True).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.01)


def test_frozen_parameters_stay(train, tiny_encoder):
    encoder = tiny_encoder()
    start = {name: p.detach().clone() for name, p in encoder.model.named_parameters()}
    trainer, _ = train(encoder, epochs=1, freeze=("embeddings.word", "layers.0."))
    for name, parameter in trainer.encoder.model.named_parameters():
        frozen = name.startswith(("embeddings.word", "layers.0."))
        assert torch.equal(parameter, start[name]) == frozen, name
        assert parameter.requires_grad


def test_a_loss_that_is_no_number_ends_the_run(train):
    class Broken(Contrastive):
        def loss(self, texts, targets):
            return super().loss(texts, targets) * math.nan

    with pytest.raises(TrainingError, match=r"the loss is nan on batch 0, which begins with '\w+"):
        train(objective=Broken(0.1, **PAIRS))


def test_bfloat16_is_close(train):
    exact, _ = train(epochs=2)
    rough, _ = train(name="bf16", epochs=2, precision="bfloat16")
    assert rough.last_loss == pytest.approx(exact.last_loss, rel=0.1)
    assert rough.last_loss != exact.last_loss
    assert weight(rough.encoder).dtype == torch.float32


def test_texts_cut_are_counted(train, tiny_encoder, caplog):
    train(tiny_encoder(max_seq_length=4), epochs=1)
    assert "training texts were longer than 4 tokens and cut there 60 times" in caplog.text


def test_what_it_refuses(tiny_encoder, make_rows, tmp_path):
    objective, rows = Contrastive(0.1, **PAIRS), make_rows()
    with pytest.raises(ValueError, match='load the model with dtype="float32"'):
        Trainer(tiny_encoder().to("cpu", "bfloat16"), objective, rows, TrainingSettings(str(tmp_path)))
    with pytest.raises(ValueError, match='"float16" needs a GPU'):
        Trainer(tiny_encoder(), objective, rows, TrainingSettings(str(tmp_path), precision="float16"))
    with pytest.raises(ValueError, match="nothing to evaluate with"):
        Trainer(tiny_encoder(), objective, rows, TrainingSettings(str(tmp_path), evaluate_every=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("schedule", "step"), ("precision", "int8"), ("epochs", 0), ("learning_rate", -1), ("ema", 1), ("seed", -1),
     ("warmup", math.nan), ("accumulation", 0)],
)  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(
        ValueError, match=f"{name} must be .* got {value}|{name} must be one of .*; got '{value}'|ema must be"
    ):
        TrainingSettings("x", **{name: value})


def test_objectives_are_prepared_once(train, make_rows, tiny_encoder):
    class Prepared(MSE):
        def prepare(self, texts, targets):
            assert not hasattr(self, "seen")
            self.seen, self.vectors = targets["teacher"].clone(), texts["text"]["embedding"].clone()

    start = tiny_encoder(dropout=0.0)
    trainer, _ = train(objective=Prepared(32, 8), epochs=2)
    batches = list(make_rows())
    assert torch.equal(trainer.objective.seen, torch.cat([batch.targets["teacher"] for batch in batches]))
    vectors = start.encode([text for batch in batches for text in batch.texts["text"]])
    torch.testing.assert_close(trainer.objective.vectors, torch.from_numpy(vectors), atol=1e-5, rtol=0)
    assert type(trainer.objective).prepare is not Objective.prepare
