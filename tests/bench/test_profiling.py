"""Where the time goes: each second to the innermost function, and the encoder left as it was."""

import pytest
import torch

from minilm.bench import gpu, profiling, timing
from minilm.bench.engines import Choice, make_engine
from minilm.bench.profiling import Stopwatch, _by_kernel, profile
from minilm.bench.timing import HostTimer
from minilm.bench.worker import Seat


def test_stopwatch_gives_each_second_to_the_innermost():
    now = [0.0]

    def passing(seconds):
        now[0] += seconds

    watch = Stopwatch(lambda: now[0])
    inner = watch.timed("inner", lambda: passing(2))

    def both():
        passing(1)
        inner()
        inner()
        passing(4)

    watch.timed("outer", both)()
    inner()
    watch.timed("inner", inner)()
    assert watch.seconds == {"outer": 5, "inner": 8}
    assert watch.calls == {"outer": 1, "inner": 4}


def test_stopwatch_survives_an_error():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError):
        watch.timed("x", lambda: 1 / 0)()
    assert watch.calls == {"x": 1}


@pytest.fixture(scope="module")
def seat(scratch):
    made = Seat()
    made.load(label="t", role="backend", name="torch", dtype="float32", device="cpu", scratch=str(scratch))
    return made


def test_profile_of_texts(seat, monkeypatch):
    monkeypatch.setattr(profiling, "NOTHING", 0.0)  # how long anything takes must not decide what is shown
    (found,) = seat.profile(["text-mixed-6"], 0.0).values()
    calls = {name: count for name, count, _ in found["parts"]}
    assert calls["linear"] == 24
    assert calls["attention"] == calls["gelu"] == 6
    assert calls["layer norm"] == 13
    assert calls["tokenise"] == 6
    assert {"pool", "embed", "other"} <= set(calls)
    assert sum(taken for *_, taken in found["parts"]) == pytest.approx(found["seconds"], rel=0.01)
    operators = {name: count for name, count, _ in found["operators"]}
    assert operators["aten::addmm"] == 24
    assert list(operators)[-2:] == ["other operators", "no operator of torch"]
    taken = [seconds for *_, seconds in found["operators"][:-2]]
    assert taken == sorted(taken, reverse=True)
    assert all(seconds >= 0 for *_, seconds in found["operators"])


def test_the_encoder_is_left_as_it_was(seat):
    backend, tokenizer = seat.engine.encoder.model.backend, seat.engine.encoder.tokenizer
    seat.profile(["tokens-16-64"], 0.0)
    assert set(vars(backend)) == {"config"}
    assert seat.engine.encoder.tokenizer is tokenizer
    assert seat.engine.encoder.encode(["a b", "c"]).shape == (2, 384)


def test_a_peer_has_no_operations_to_tell_apart(scratch):
    peer = make_engine(Choice("p", "peer", "transformers", "float32", "cpu", str(scratch)))
    with pytest.raises(TypeError, match="only backends can be profiled, not p"):
        profile(peer, None, 0.0)


def test_profile_by_kernel(monkeypatch):
    kernels = {f"kernel {number}": (1, 0.001 * number) for number in range(1, 31)}
    monkeypatch.setattr(gpu, "kernels", lambda _: kernels)
    monkeypatch.setattr(timing, "CudaTimer", lambda: HostTimer(clock=iter(range(1000)).__next__))
    found = _by_kernel(lambda: torch.ones(1))
    assert found["seconds"] == 1
    assert found["parts"][0] == ("kernel 30", 1, 0.03)
    assert found["parts"][-2] == ("other kernels", 10, pytest.approx(0.055))
    assert found["parts"][-1] == ("no kernel running", 1, pytest.approx(1 - 0.465))
