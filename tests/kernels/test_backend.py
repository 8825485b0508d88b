"""Choosing a backend: by name, class, module or file; what can't run says why; only `auto` falls back, and says so."""

import copy
import pickle
import sys
import textwrap

import pytest
import torch

import minilm
from minilm import MiniLM, MiniLMConfig, PackedBatch
from minilm.kernels import backend as choosing
from minilm.kernels.backend import BackendError, BackendWarning, make_backend
from minilm.kernels.torch_backend import TorchBackend

CONFIG = MiniLMConfig(vocab_size=99, hidden_size=24, num_layers=2, num_heads=3, feed_forward_size=40)
BATCH = PackedBatch.from_sequences([[1, 2, 3], [4]])


class Doubling(TorchBackend):
    """Not the truth: twice the activation."""

    name = "doubling"

    def gelu(self, x):
        return 2 * super().gelu(x)


class Elsewhere(TorchBackend):
    """Runs only on a machine that isn't this one."""

    name = "elsewhere"

    @classmethod
    def unavailable(cls, config, device):
        return f"it wants 25 columns, not {config.hidden_size}, and no {device}"


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent(
            """
            from minilm.kernels.torch_backend import TorchBackend


            class Own(TorchBackend):
                name = "own"

                def gelu(self, x):
                    return x.relu()


            not_a_class = 3
            """
        )
    )
    return path


@pytest.mark.parametrize("choice", ["torch", TorchBackend, "minilm.kernels.torch_backend:TorchBackend"])
def test_ways_to_name_plain_torch(choice):
    assert type(make_backend(choice, CONFIG)) is TorchBackend


def test_a_class_in_a_file(own_file):
    made = make_backend(f"{own_file}:Own", CONFIG)
    assert made.gelu(torch.tensor(-1.0)) == 0
    assert made.describe() == {"class": f"{own_file}:Own"}
    assert type(make_backend(f"{own_file}:Own", CONFIG)) is type(made)  # the file ran once


def test_a_class_in_a_module(own_file, monkeypatch):
    monkeypatch.syspath_prepend(own_file.parent)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    assert make_backend("own:Own", CONFIG).name == "own"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("cuda", "unknown backend 'cuda': expected auto, torch, packed, int8, triton, or where a subclass of Torch"),
        ("nowhere:Own", "No module named 'nowhere'"),
        ("no/such/file.py:Own", "can't be read"),
        ("{file}:Missing", "expected a subclass of TorchBackend called Missing in .*own.py, found none"),
        ("{file}:not_a_class", "got 3"),
    ],
)
def test_what_is_no_backend(choice, message, own_file):
    with pytest.raises(BackendError, match=message):
        make_backend(choice.format(file=own_file), CONFIG)
    with pytest.raises(BackendError, match=message):
        MiniLM(CONFIG, choice.format(file=own_file))


def test_a_file_that_raises_is_not_kept(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('mine')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            make_backend(f"{path}:Own", CONFIG)
    assert str(path) not in sys.modules


def test_neither_string_nor_class():
    with pytest.raises(TypeError, match="subclass of TorchBackend, got <class 'dict'>"):
        make_backend(dict, CONFIG)


def test_an_explicit_choice_that_cannot_run_says_why(canonical_folder):
    reason = "the elsewhere backend can't run here: it wants 25 columns, not 384, and no cpu"
    with pytest.raises(BackendError, match=reason):
        minilm.load(canonical_folder, device="cpu", backend=Elsewhere)


def test_auto_takes_packed_weights_on_a_cpu():
    assert make_backend("auto", CONFIG).name == make_backend("packed", CONFIG).name == "packed"


def test_auto_falls_back_and_says_so(monkeypatch):
    monkeypatch.setitem(choosing.AUTOMATIC, "cuda", f"{__file__}:Elsewhere")
    with pytest.warns(BackendWarning, match="25 columns, not 24, and no cuda; plain torch computes instead"):
        assert type(make_backend("auto", CONFIG, "cuda")) is TorchBackend


def outputs(model):
    with torch.no_grad():
        return model(BATCH).last_hidden_state


def test_use_backend_is_undone_whatever_happens():
    model = MiniLM(CONFIG, "torch").eval()
    before = outputs(model)
    with model.use_backend(Doubling) as backend:
        assert backend.name == model.backend.name == "doubling"
        assert not torch.equal(outputs(model), before)
        with model.use_backend("torch"):
            assert torch.equal(outputs(model), before)
        assert model.backend.name == "doubling"
    assert torch.equal(outputs(model), before)
    with pytest.raises(KeyError), model.use_backend(Doubling):
        raise KeyError
    with pytest.raises(BackendError), model.use_backend(Elsewhere):
        pytest.fail("entered the block")
    assert model.backend.name == "torch"


def test_copies_and_pickles_make_their_own():
    model = MiniLM(CONFIG, Doubling).eval()
    before = outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.backend is not model.backend
        assert torch.equal(outputs(twin), before)


def test_a_shortcut_is_taken_unless_states_are_wanted():
    class Shortcut(TorchBackend):
        name = "shortcut"

        def whole(self, batch, weights):
            return torch.full((batch.num_tokens, weights.embeddings.word.weight.shape[1]), 7.0)

    model = MiniLM(CONFIG, Shortcut).eval()
    assert (outputs(model) == 7).all()
    states = model(BATCH, hidden_states=True).hidden_states
    assert len(states) == 3
    assert not (states[-1] == 7).any()


def test_a_batch_used_without_gradients_serves_training_too():
    """Its groups of equal lengths are kept from the first use on."""
    batch = PackedBatch.from_sequences([[1, 2, 3], [4]])
    model = MiniLM(CONFIG)
    with torch.inference_mode():
        model(batch)
    vectors = model.backend.pool((model(batch).last_hidden_state,), batch, "mean")
    (vectors * torch.linspace(-1, 1, 24)).sum().backward()
    assert model.layers[0].attention.qkv.weight.grad.abs().sum() > 1e-6
