"""What is asked of a GPU, with a GPU that is made up: on a CPU the same calls, events and formulas."""

from types import SimpleNamespace

import pytest
import torch

from minilm.bench import ceilings, gpu
from minilm.bench.ceilings import Machine
from minilm.bench.engines import Choice
from minilm.bench.results import peak
from minilm.bench.timing import HostTimer


def event(name: str, device: str = "CUDA", microseconds: float = 10.0, *, annotation: bool = False):
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(name=name, device_type=kind, time_range=elapsed, is_user_annotation=annotation)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Calls of torch.cuda that do nothing, and a profiler that has seen some events."""
    seen = [event("gemm"), event("gemm", microseconds=30.0), event("softmax")]
    seen += [event("aten::mm", "CPU"), event("Memcpy DtoD"), event("a region", annotation=True)]

    class Profiler:
        def __init__(self, activities):
            assert len(activities) == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def events(self):
            return seen

    monkeypatch.setattr("torch.profiler.profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(gpu, "CudaTimer", HostTimer)


def test_kernels_are_counted_and_nothing_else(fake_cuda):  # noqa: ARG001
    found = gpu.kernels(lambda: None)
    assert found == {"gemm": (2, pytest.approx(40e-6)), "softmax": (1, pytest.approx(10e-6))}


def test_kernels_of_a_real_profile_on_a_cpu(monkeypatch):
    """No kernel runs on a GPU that is not there; the real profiler's events have the fields that are read."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    profiler = torch.profiler.profile
    monkeypatch.setattr("torch.profiler.profile", lambda activities: profiler(activities=activities[:1]))
    assert gpu.kernels(lambda: torch.ones(4, 4) @ torch.ones(4, 4)) == {}


def test_extras_of_one_sequence(fake_cuda, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(gpu, "graphed", lambda call: call)
    found = gpu.extras(lambda: None, one_sequence=True)
    assert found["launches"] == 3
    assert all(found[f"{name}_latency"]["rounds"] == gpu.LATENCY_CALLS for name in ("host", "device", "graph"))


def test_a_call_that_can_not_be_captured_keeps_its_other_figures(fake_cuda, monkeypatch):  # noqa: ARG001
    def refuse(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "graphed", refuse)
    found = gpu.extras(lambda: None, one_sequence=True)
    assert found["graph_latency_error"] == "RuntimeError: operation not permitted when stream is capturing"
    assert "host_latency" in found
    assert set(gpu.extras(lambda: None, one_sequence=False)) == {"launches"}


def test_working_memory_is_what_is_held_beyond_before(fake_cuda):  # noqa: ARG001
    assert gpu.working_memory(lambda: None) == 250


def machine(scratch, dtype: str) -> Machine:
    return Machine(Choice("machine", "machine", "machine", dtype, "cpu", str(scratch)))


def test_ceilings_of_a_cpu(scratch, monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_ROWS", (8, 16))
    made = machine(scratch, "float32,bfloat16,int8")
    made.imports()
    made.load()
    facts = made.facts()
    assert facts["F.linear, 16x384x1536 float32"]["amount"] == 2 * 16 * 384 * 1536
    assert {"float32", "bfloat16"} <= {fact["dtype"] for fact in facts.values()}
    assert [workload.name for workload in made.own_workloads()] == list(facts)
    for workload in made.own_workloads():
        assert tuple(made.call(workload, 0)().shape) in {(n, width) for n in (8, 16) for width in (384, 1536)}


@pytest.mark.parametrize(
    ("make", "precision", "limit"),
    [
        (ceilings._linear, "float32", 1e-6),
        (ceilings._linear, "bfloat16", 0.01),
        (ceilings._packed, "float32", 1e-6),
        (ceilings._packed, "bfloat16", 0.01),
        (ceilings._int8, "int8", 0.05),
    ],
)
def test_a_ceiling_is_the_product_or_is_said_to_be_missing(make, precision, limit):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 64, generator=generator), torch.randn(32, 64, generator=generator)
    try:
        product = make(x, weight, precision)().float()
    except (AttributeError, RuntimeError):
        pytest.skip(f"this torch has no such product in {precision}")
    assert float((product - x @ weight.T).norm() / (x @ weight.T).norm()) < limit


def test_ceilings_that_are_not_there_or_wrong_are_left_out(scratch, monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_ROWS", (8,))
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(ceilings, "_int8", lambda x, weight, _: lambda: x @ weight.T * 1.1)
    made = machine(scratch, "float32,int8")
    made.load()
    assert {name.partition(",")[0] for name in made.ceilings} == {"F.linear"}


def test_ceilings_of_a_gpu(scratch, monkeypatch):
    """The GPU's own measurements, small, where tensors on the CPU do."""
    monkeypatch.setattr(ceilings, "GPU_SIZE", 32)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(gpu, "graphed", lambda call: call)
    made = machine(scratch, "float32,bfloat16")
    made.ceilings = dict(made._gpu())
    facts = made.facts()
    assert facts["matrix product 32^3 bfloat16"] == {"amount": 2 * 32**3, "unit": "FLOP/s", "dtype": "bfloat16"}
    assert facts["copy of 1 MiB"]["amount"] == 2 << 20
    (l2,) = [fact for name, fact in facts.items() if name.startswith("L2")]
    size = l2["amount"] / ceilings.L2_REPEATS  # read and written each time; it must stay in the cache
    assert 0.25 * (1 << 20) < size < 0.5 * (1 << 20)
    for workload in made.own_workloads():
        made.call(workload, 0)()


def test_peak_is_the_fastest_product_in_that_dtype():
    def ceiling(unit, dtype, median):
        return {"unit": unit, "dtype": dtype, "median": median}

    found = {
        "a": ceiling("FLOP/s", "float32", 1.0),
        "b": ceiling("FLOP/s", "float32", 2.0),
        "c": ceiling("FLOP/s", "float16", 9.0),
        "d": ceiling("B/s", "float32", 99.0),
    }
    assert peak(found, "float32") == 2
    assert peak(found, "bfloat16") is None
