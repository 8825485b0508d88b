"""The kernels compile ahead of time for GPUs that aren't here, and one that should not pass does not."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from minilm.kernels import report

FOLDER = Path(report.__file__).parent
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.py"))}
TARGETS = [f"{gpu} {dtype}" for gpu in ("sm_80", "sm_90") for dtype in report.DTYPES] + ["gfx942 float16"]


def compiling(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done


def compiled_rows(*options: str) -> list[dict[str, object]]:
    """Return the rows that `minilm kernels report` prints."""
    minilm = Path(sysconfig.get_path("scripts")) / "minilm"
    return json.loads(compiling(minilm, "kernels", "report", "--json", *options).stdout)["rows"]


# The kernels.


@pytest.fixture(scope="module")
def rows():
    """Every kernel on the hardware that has to do, at all dtypes; on AMD's at one, for time's sake."""
    return compiled_rows("--hardware", "sm_80", "sm_90") + compiled_rows("--hardware", "gfx942", "--dtype", "float16")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", report.KERNELS)
def test_compiles_without_spills_within_the_shared_memory(rows, kernel, target):
    found = [row for row in rows if (row["kernel"], f"{row['hardware']} {row['dtype']}") == (kernel, target)]
    assert found or target.endswith("float32")  # which a kernel may leave to others
    assert not {row["launch"]: row["failure"] for row in found if not row["ok"]}
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in found)
    assert all(row["shared_memory"] <= report.HARDWARE[row["hardware"]].shared_memory for row in found)


def test_every_file_with_examples_is_listed():
    with_examples = {
        module
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "examples"
    }
    assert sorted(report.KERNELS) == sorted(with_examples)


def test_every_function_that_is_launched_is_compiled(rows):
    """A function compiled by Triton that no other such function calls is launched."""
    jitted, called = {}, set()
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in " ".join(map(ast.unparse, node.decorator_list)):
                jitted[f"minilm.kernels.{module}.{node.name}"] = node.name
                called |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    launched = {path for path, name in jitted.items() if name not in called}
    assert launched
    assert not launched - {row["function"] for row in rows}


# What the report would say of kernels that are not as they should be.

BAD_KERNELS = '''
"""Products of tiles: one as it should be, and one for each fault."""

import os

import torch
import triton
import triton.language as tl

from minilm.kernels.launch import Launch


@triton.jit
def product(x, y, out, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(x + m[:, None] * K + start + k[None, :])
        right = tl.load(y + (start + k)[:, None] * BLOCK_N + n[None, :])
        sums += tl.dot(left, right)
    tl.store(out + m[:, None] * BLOCK_N + n[None, :], sums)


class Crash(Launch):
    def compile(self, hardware):
        os._exit(1)


def launch(dtype, m, n, k, warps, stages, kind=Launch):
    x, out = torch.empty(16, dtype=dtype), torch.empty(16)
    arguments = {"x": x, "y": x, "out": out, "K": 512, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return kind(product, (1,), arguments, warps, stages)


def examples(dtype, hardware):
    too_deep = hardware.shared_memory // 2**15 + 2  # a stage takes 32 KB
    crash = {"crashes": launch(dtype, 64, 64, 32, 4, 2, Crash)} if hardware.architecture == "sm_80" else {}
    return crash | {
        "is good": launch(dtype, 64, 64, 32, 4, 2),
        "spills": launch(dtype, 128, 128, 32, 1, 2),
        "waits": launch(dtype, 128, 256, 32, 4, 2),
        "is too large": launch(dtype, 64, 64, 128, 4, too_deep),
        "is no power of 2": launch(dtype, 96, 64, 32, 4, 2),
    }
'''

# Prints what the report says of kernels beside what their machine code says of itself.
COMPARE = """
import re, subprocess, sys
import torch, triton
from minilm.kernels import report
_, kernels, file = sys.argv
for hardware in (report.SM_80, report.SM_90):
    for name in ("is good", "spills"):
        row = report.Row(kernels, name, hardware.architecture, "float16")
        launch = report._examples(row)[name]
        row = report.compile_row(row, launch, hardware)
        with open(file, "wb") as cubin:
            cubin.write(launch.compile(hardware).asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(row.registers, row.spilled, *re.search(r"REG:(\\d+) STACK:(\\d+) .* LOCAL:(\\d+)", usage).groups())
"""


@pytest.fixture(scope="module")
def bad_kernels(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "bad_kernels.py"
    path.write_text(BAD_KERNELS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bad_rows(bad_kernels):
    gpus = ["sm_80", "sm_90", "gfx942"]
    rows = compiled_rows("--kernel", str(bad_kernels), "--hardware", *gpus, "--dtype", "float16")
    return {(row["launch"], row["hardware"]): row for row in rows}


GPUS = pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])


@GPUS
def test_a_good_kernel_passes(bad_rows, gpu):
    row = bad_rows["is good", gpu]
    assert row["ok"]
    assert row["instructions"].split()[0] == {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}[gpu]
    assert row["tile"] == "M64 N64 K32"
    assert row["seconds"] > 0


@GPUS
def test_spills_fail(bad_rows, gpu):
    row = bad_rows["spills", gpu]
    assert not row["ok"]
    assert row["spilled"] > 50
    assert row["failure"] == f"spills {row['spilled']} bytes"


@GPUS
def test_more_shared_memory_than_there_is_fails(bad_rows, gpu):
    row = bad_rows["is too large", gpu]
    limit = {"sm_80": 163, "sm_90": 227, "gfx942": 64}[gpu] * 1024
    assert row["shared_memory"] > limit
    assert f"wants {row['shared_memory']} bytes of shared memory, {gpu} has {limit}" in row["failure"]


@GPUS
def test_an_error_of_the_compiler_fails(bad_rows, gpu):
    row = bad_rows["is no power of 2", gpu]
    assert not row["ok"]
    assert row["registers"] is None
    assert "arange's range must be a power of 2" in row["failure"]


def test_a_crash_of_the_compiler_fails_alone(bad_rows):
    assert bad_rows["crashes", "sm_80"]["failure"] == "the compiler crashed"


def test_products_that_wait_for_each_other_show(bad_rows):
    row = bad_rows["waits", "sm_90"]
    assert row["instructions"] == "wgmma"
    assert row["note"].startswith("each wgmma waits for the one before: insufficient register resources")
    assert bad_rows["is good", "sm_90"]["note"] is None


def test_figures_are_those_of_the_machine_code(bad_kernels, tmp_path):
    """What the driver sets aside for a thread is written in the machine code."""
    printed = compiling(sys.executable, "-c", COMPARE, bad_kernels, tmp_path / "cubin").stdout
    for line in printed.splitlines():
        registers, spilled, code_registers, stack, local = map(int, line.split())
        assert (registers, spilled) == (code_registers, stack + local)
    assert len(printed.splitlines()) == 4


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"unknown kernel 'layernorm': expected .*layer_norm.*, or path/to/file.py"):
        report.compile_rows(["layernorm"])
