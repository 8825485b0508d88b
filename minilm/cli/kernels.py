"""`minilm kernels`: what the Triton kernels become on a GPU, without one."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from minilm.cli.common import Commands, Parser, UsageError, add_command, print_json, shows_progress

if TYPE_CHECKING:
    from minilm.kernels.report import Row

HARDWARE = ("sm_80", "sm_89", "sm_90", "gfx942")
DTYPES = ("float16", "bfloat16", "float32")

REPORT_EPILOG = """\
Compiles every kernel in the sizes it is launched in, for GPUs that need not be here:
sm_80 (A100), sm_89 (L4, GeForce 40), sm_90 (H100, H200), gfx942 (MI300).

  registers     a thread's; more of them, fewer threads at once
  spilled       bytes a thread keeps in memory for want of registers: a row with any fails
  shared        KB of memory that a program uses, of what the hardware has: a row with more fails
  instructions  how tiles are multiplied (wgmma, mma; mfma on AMD) and moved (TMA, ldmatrix)

Exit code 1 if a row fails. FILE.py is a file of your own: Triton kernels, and a function
examples(dtype, hardware) that returns a dictionary of minilm.kernels.launch.Launch.

examples:
  minilm kernels report
  minilm kernels report --hardware sm_90 --dtype float16
  minilm kernels report --kernel layer_norm own_attention.py --json
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `kernels report`."""
    kernels = commands.add_parser("kernels", help="compile the kernels", description="Compile the Triton kernels.")
    actions = kernels.add_subparsers(title="actions", metavar="ACTION", required=True)
    summary = "compile the kernels for GPUs that need not be here"
    parser = add_command(actions, "report", run_report, summary=summary, epilog=REPORT_EPILOG)
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="files in kernels/, or FILE.py (default: all)")
    for option, metavar, choices in (("--hardware", "GPU", HARDWARE), ("--dtype", "DTYPE", DTYPES)):
        names = f"{', '.join(choices)} (default: all)"
        parser.add_argument(option, nargs="+", choices=choices, default=choices, metavar=metavar, help=names)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_report(arguments: argparse.Namespace) -> int:
    """Compile, print the table, and return 1 if a row fails."""
    try:
        import triton
    except ImportError as error:
        raise ImportError('kernels are compiled by Triton: pip install "minilm[triton]"') from error
    from minilm.kernels.launch import INTERPRETED
    from minilm.kernels.report import KERNELS, compile_rows
    from minilm.progress import progress_bar

    if INTERPRETED:
        raise UsageError("kernels are interpreted, not compiled, under TRITON_INTERPRET=1: unset it")
    total, compiling = compile_rows(arguments.kernel or KERNELS, arguments.hardware, arguments.dtype)
    rows = []
    with progress_bar(shows_progress(arguments), total, "compile", "kernel") as advance:
        for row in compiling:
            rows.append(row)
            advance(1)
    if arguments.json:
        print_json({"triton": triton.__version__, "rows": [{**asdict(row), "ok": row.ok} for row in rows]})
    else:
        _print_table(rows)
        good = sum(row.ok for row in rows)
        print(f"{good} of {total} compile without spills, within the shared memory (triton {triton.__version__})")
    return 0 if all(row.ok for row in rows) else 1


def _print_table(rows: list[Row]) -> None:
    """Print the rows under the names of their launches."""
    width = max((len(row.tile) for row in rows), default=0)
    heading = f"{'tile':<{width}}  warps  stages  registers  spilled     shared KB  seconds  instructions"
    print(f"  hardware  dtype     {heading}")
    above = None
    for row in rows:
        if (row.kernel, row.launch) != above:
            above = (row.kernel, row.launch)
            print(f"{row.kernel}: {row.launch}")
        print(f"  {row.hardware:<8}  {row.dtype:<8}  {_figures(row, width)}{_verdict(row)}")


def _figures(row: Row, width: int) -> str:
    """Return the figures of a row, if it was compiled, as they stand in the table."""
    if row.shared_memory is None:
        return ""
    shared = f"{row.shared_memory / 1024:>6.1f} of {row.shared_memory_limit // 1024:>3}"
    return (
        f"{row.tile:<{width}}  {row.num_warps:>5}  {row.num_stages:>6}  {row.registers:>9}  {row.spilled:>7}  "
        f"{shared}  {row.seconds:>7.1f}  {row.instructions or '-':<18}  "
    )


def _verdict(row: Row) -> str:
    """Return what is wrong with a row, or worth knowing; an error of the compiler has its reason at either end."""
    text = row.failure or ""
    if len(text) > 300:
        text = f"{text[:140]} ... {text[-140:]}"
    return (f"FAILED: {text}" if text else "ok") + (f" ({row.note})" if row.note else "")
