"""The Triton backend as a whole: a model computes and trains on it as it does on plain torch."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm import MiniLM, MiniLMConfig, PackedBatch
from minilm.kernels import encoder as whole_encoder
from minilm.kernels.backend import BackendWarning, make_backend
from minilm.kernels.launch import INTERPRETED
from minilm.kernels.torch_backend import TorchBackend
from minilm.kernels.triton_backend import TritonBackend

BATCHES = {"short": [1, 2, 15, 16, 17], "long": [65, 3], "one-token": [1]}
SIZES = {  # hidden size, heads, feed-forward size: heads 32 wide, as MiniLM has, and others
    "heads-32": (64, 2, 128),
    "heads-24": (192, 8, 96),
    "heads-64": (128, 2, 256),
    "heads-128": (256, 2, 64),
    "rows-too-wide-for-one-program": (448, 7, 64),
}


def config(sizes="heads-32", **more):
    hidden, heads, feed_forward = SIZES[sizes]
    options = {"vocab_size": 99, "num_layers": 2, "max_positions": 80, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return MiniLMConfig(hidden_size=hidden, num_heads=heads, feed_forward_size=feed_forward, **{**options, **more})


def build(of, dtype, device):
    """A model with weights large enough for every part of it to matter."""
    torch.manual_seed(0)
    model = MiniLM(of, "torch").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.1)
    return model.to(device, dtype)


def pack(lengths, device, vocabulary=99):
    generator = torch.Generator().manual_seed(sum(lengths))
    sequences = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.from_sequences(sequences, device=device)


def states(model, batch, choice, **context):
    with model.use_backend(choice), torch.inference_mode(**context):
        return model(batch).last_hidden_state


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_inference_in_one_operation(lengths, dtype, device, judge):
    model, batch = build(config(), dtype, device), pack(lengths, device)
    exact = states(copy.deepcopy(model).double(), batch, "torch")
    judge(states(model, batch, "triton"), states(model, batch, "torch"), exact)


@pytest.mark.parametrize("sizes", SIZES)
def test_other_sizes(sizes, device, judge):
    model, batch = build(config(sizes, num_layers=1), torch.float32, device), pack([5, 1, 18], device)
    exact = states(copy.deepcopy(model).double(), batch, "torch")
    judge(states(model, batch, "triton"), states(model, batch, "torch"), exact)
    assert not model.backend_on(device).describe().get("left to plain torch")


@pytest.mark.parametrize("name", ["WithoutGraphs", "StepByStep", "WholeFeedForward"])
def test_candidates_compute_the_same(name, device, judge):
    choice = f"minilm.kernels.triton_backend:{name}"
    model, batch = build(config(num_layers=1), torch.float16, device), pack([5, 1, 18], device)
    exact = states(copy.deepcopy(model).double(), batch, "torch")
    judge(states(model, batch, choice), states(model, batch, "torch"), exact)


@pytest.mark.parametrize("wanted", ["hidden_states", "attentions"])
def test_states_and_attentions_come_step_by_step(wanted, dtype, device):
    model, batch = build(config(), dtype, device), pack([5, 17], device)
    with torch.no_grad():
        plain = model(batch, **{wanted: True})
        with model.use_backend("triton"):
            ours = model(batch, **{wanted: True})
    for mine, theirs in zip(getattr(ours, wanted), getattr(plain, wanted), strict=True):
        mine, theirs = (torch.cat([x.flatten() for x in y]) for y in (mine, theirs))
        torch.testing.assert_close(mine, theirs, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_rows_of_a_graphs_padding_change_nothing(dtype, device):
    """A CUDA graph's tokens beyond the last sequence: finite, and the others as without them."""
    model, batch = build(config(), dtype, device), pack([5, 1, 17], device)
    tensors = whole_encoder.flatten(model, 2)
    tokens = torch.stack([batch.ids, batch.type_ids, batch.positions])
    bounds = batch.cu_seqlens

    def launched(tokens, bounds):
        operands = (*tokens.unbind(), bounds, None, tensors.weights, tensors.num_heads, tensors.eps)
        return whole_encoder.launch(*operands)

    with torch.no_grad():
        alone = launched(tokens, bounds)
        padded = launched(F.pad(tokens, (0, 9)), F.pad(bounds, (0, 20), value=batch.num_tokens))
    assert padded.isfinite().all()
    assert torch.equal(padded[: batch.num_tokens], alone)


def test_a_sequence_is_the_same_in_any_company(dtype, device):
    """Attention by sequence (there is one of more than 64 tokens), and rows that no product mixes."""
    model = build(config(), dtype, device)
    one, two, three = (torch.arange(n) % 97 for n in (66, 9, 30))
    together = PackedBatch.from_sequences([x.tolist() for x in (two, one, three)], device=device)
    reordered = PackedBatch.from_sequences([x.tolist() for x in (three, two, one)], device=device)
    ours, others = (states(model, batch, "triton") for batch in (together, reordered))
    for here, there in ((0, 1), (1, 2), (2, 0)):
        assert torch.equal(together.sequence(ours, here), reordered.sequence(others, there))


# Training.


def gradients(model, batch, choice):
    with model.use_backend(choice):
        out = model(batch).last_hidden_state
        pooled = model.backend.pool((out,), batch, "mean", normalize=True)
        weights = torch.linspace(-1, 1, pooled.numel(), device=pooled.device).view_as(pooled)
        loss = (pooled * weights.to(pooled.dtype)).sum()
    return torch.autograd.grad(loss, list(model.parameters()))


def test_every_parameters_gradient(dtype, device, judge):
    model, batch = build(config(num_layers=1), dtype, device), pack([1, 2, 17, 30], device)
    names = " ".join(name for name, _ in model.named_parameters())
    exact = gradients(copy.deepcopy(model).double(), batch, "torch")
    judge(gradients(model, batch, "triton"), gradients(model, batch, "torch"), exact, names)


def test_gradients_under_autocast(device, judge):
    """Products in float16 as autocast has them, attention by its kernel in the same; LayerNorms in float32."""
    model, batch = build(config(num_layers=1), torch.float32, device), pack([1, 2, 17, 30], device)
    names = " ".join(name for name, _ in model.named_parameters())
    exact = gradients(copy.deepcopy(model).double(), batch, "torch")
    found, seen = [], []

    class Watched(TritonBackend):
        def attention(self, query, *others):
            seen.append(query.dtype)
            return super().attention(query, *others)

    for choice in (Watched, "torch"):
        with torch.autocast(device, torch.float16):
            found.append(gradients(model, batch, choice))
    halved = [[gradient.half() for gradient in some] for some in found]  # their errors are float16's
    judge(*halved, exact, names)
    assert seen == [torch.float16]


def test_ten_steps_of_training_lose_alike(device):
    """In-batch contrastive training of a tiny model, float32: the same losses, step by step."""
    queries, passages = (pack(lengths, device, vocabulary=20) for lengths in ([3, 7, 5], [6, 2, 9]))

    def losses(choice):
        model = build(config(num_layers=1, max_positions=9, vocab_size=20), torch.float32, device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seen = []
        with model.use_backend(choice):
            for _ in range(10):
                vectors = [
                    model.backend.pool((model(batch).last_hidden_state,), batch, "mean", normalize=True)
                    for batch in (queries, passages)
                ]
                loss = F.cross_entropy(vectors[0] @ vectors[1].T / 0.05, torch.arange(3, device=device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append(loss.item())
        return seen

    ours, plain = losses("triton"), losses("torch")
    assert plain[-1] < plain[0] / 2
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-5)


# What is left to plain torch, and said so.


def test_heads_too_wide_for_the_kernel(device):
    of = MiniLMConfig(vocab_size=9, hidden_size=320, num_layers=1, num_heads=2, feed_forward_size=64, max_positions=8)
    with pytest.warns(BackendWarning, match="plain torch computes attention: .*1 to 128 numbers, not 160"):
        backend = make_backend("triton", of, device)
    assert "160" in backend.describe()["left to plain torch"]["attention"]
    model, batch = build(of, torch.float32, device), PackedBatch.from_sequences([[1, 2], [3]], device=device)
    plain = states(model, batch, "torch")
    with pytest.warns(BackendWarning, match="attention"):
        ours = states(model, batch, "triton")
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


def test_float64(device):
    model, batch = build(config(num_layers=1), torch.float64, device), pack([3], device)
    plain = states(model, batch, "torch")
    with pytest.warns(BackendWarning, match="float16, bfloat16 and float32, not torch.float64"):
        assert torch.equal(states(model, batch, "triton"), plain)


def test_dropout_in_attention(device):
    model, batch = build(config(num_layers=1, attention_dropout=0.5), torch.float32, device).train(), pack([9], device)
    with model.use_backend("triton") as backend:
        with pytest.warns(BackendWarning, match="attention with dropout: its kernel has none; attention_dropout=0"):
            first = model(batch).last_hidden_state
        assert not torch.equal(first, model(batch).last_hidden_state)
        assert "attention with dropout" in backend.describe()["left to plain torch"]


def test_an_operation_of_ones_own_is_used_in_place_of_fused_ones(device):
    """Whatever a subclass overrides takes part, in one operation's place or a whole block's."""
    model, batch = build(config(num_layers=1), torch.float32, device), pack([5, 3], device)

    def own(name):
        def tripled(self, *operands):
            return 3 * getattr(TorchBackend, name)(self, *operands)

        return {name: tripled}

    for name in ("gelu", "linear", "layer_norm", "add_layer_norm", "attention", "embed"):
        theirs = type("Theirs", (TorchBackend,), own(name))
        ours = type("Ours", (TritonBackend,), own(name))
        if name == "layer_norm":  # plain torch's other operations are made of it, and so must be ours
            theirs.add_layer_norm = TorchBackend.add_layer_norm
        expected, got = states(model, batch, theirs), states(model, batch, ours)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# Where it runs.


def test_without_a_gpu_it_says_what_it_needs():
    script = (
        "from minilm import MiniLMConfig; from minilm.kernels.backend import make_backend\n"
        "make_backend('triton', MiniLMConfig(), 'cpu')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "BackendError: the triton backend can't run here: its kernels need a GPU" in done.stderr


def test_it_says_when_kernels_are_interpreted(device):
    assert make_backend("triton", config(), device).describe()["interpreted"] is INTERPRETED


# As an operation of torch.


def operands(model, batch):
    tensors = whole_encoder.flatten(model, 2)
    where = batch.ids, batch.type_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen
    return (*where, [x.detach() for x in tensors.weights], tensors.num_heads, tensors.eps)


def test_the_operation_registers_fully(device):
    model = build(config(num_layers=1), torch.float32, device)
    opcheck(whole_encoder._encode, operands(model, pack([3, 1], device)))


def test_its_reference_is_the_model(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    model, batch = build(config(num_layers=1), dtype, device), pack([3, 1, 17], device)
    exact = states(copy.deepcopy(model).double(), batch, "torch")
    judge(whole_encoder.reference(*operands(model, batch)), states(model, batch, "torch"), exact)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_model_compiles_as_one_graph(training, device):
    model = MiniLM(config(num_layers=1), "triton").eval().to(device)
    model.backend_on(device)  # as `minilm.load` does: what chooses a backend can't be traced
    batch = pack([3, 1], device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        got, expected = (f(batch).last_hidden_state for f in (compiled, model))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        if training:
            assert torch.autograd.grad(got.sum(), model.embeddings.norm.weight)[0].isfinite().all()
