"""`minilm bench`: engines measured side by side."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.cli.common import MODEL_HELP, Commands, Parser, UsageError, add_command
from minilm.cli.files import open_output

if TYPE_CHECKING:
    from minilm.bench.settings import Settings

EPILOG = """\
Each engine runs in a process of its own; they take turns, in rounds, until the time is up. Before that, each is held
against plain torch in float32 on the same inputs: one that differs by more than it promises is marked WRONG, and if it
is a backend the exit code is 1. An engine that is missing or crashes is named with its reason, and the others go on.

backends (--backend): auto, packed, int8, torch, triton, package.module:Class or path/to/file.py:Class; @DTYPE behind
  one sets what it computes in, as in packed@bfloat16
{peers}
  pip install "minilm[peers]" brings those for a CPU. What they compute from is made of the model's weights: their own
  tools fuse and quantise it. @DTYPE sets their dtype too, as in openvino@bfloat16.
workloads (--workloads): texts, tokens, attention (all usual ones of that kind), or any such as
  text-short-256     256 short sentences             text-mixed-192     192 texts of one sentence to several
  text-128-96        96 texts of 128 tokens          tokens-128-64k     64k tokens in sequences of 128: no tokenising
  tokens-mixed-4k    lengths as text-mixed has them  attention-64-64k   attention alone
  By default: texts on a CPU, everything on a GPU. Texts are made of the sentences of --data, a folder of STS data
  (see minilm eval sts --help) or a file with one a line; without it, of the package's own.

examples:
  minilm bench --peers sentence-transformers --data sts/
  minilm bench --backend packed,packed@bfloat16,int8 --data sts/ --sts --seconds 600 --json cpu.json --plot cpu.png
  minilm bench --backend torch,own_attention.py:OwnAttention --peers none --workloads text-mixed-192,tokens
  minilm bench --device cuda --json gpu.json --plot gpu.png          everything there is to know of a GPU; 7 minutes
  minilm bench --backend torch --peers none --threads 1,2,4          how speed grows with threads
  minilm bench --backend torch --profile --workloads text-mixed-192  where the time goes
  minilm bench --show gpu.json --plot gpu.png --baseline torch       an earlier run again
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `bench`."""
    from minilm.bench.peers import PEERS

    peers = textwrap.fill(f"peers (--peers): {', '.join(PEERS)}; or none", 118, subsequent_indent="  ")
    epilog = EPILOG.format(peers=peers)
    parser = add_command(commands, "bench", run, summary="measure backends and peers side by side", epilog=epilog)
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--backend", metavar="NAMES", help="ours, joined by commas (default: auto; on a GPU triton,torch)"
    )
    group.add_argument("--peers", metavar="NAMES", help="others, with @DTYPE likewise (default: all for the device)")
    group.add_argument("--workloads", metavar="NAMES", help="default: texts; on a GPU all")
    group.add_argument("--data", metavar="PATH", help="where sentences come from (default: the package's own)")
    group.add_argument("--model", metavar="NAME", help=MODEL_HELP)
    group = parser.add_argument_group("how")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on a GPU, else float32)")
    group.add_argument("--threads", metavar="N,...", help="threads of every engine; several counts compare them")
    group.add_argument("--seconds", type=float, metavar="S", help="time to take (default: 300; on a GPU 400)")
    group.add_argument(
        "--min-cosine", type=float, metavar="X", help="what a backend must reach (default: by its dtype)"
    )
    parity = "whether to hold every operation of our backends against float64 first (default: on a GPU)"
    group.add_argument("--parity", action=argparse.BooleanOptionalAction, help=parity)
    group.add_argument("--sts", action="store_true", help="evaluate each engine too, on the STS tasks in --data")
    group.add_argument("--profile", action="store_true", help="show where the time of the first backend goes instead")
    group = parser.add_argument_group("what to show")
    group.add_argument("--baseline", metavar="NAME", help="the engine whose speed is 1 (default: the first)")
    group.add_argument("--json", metavar="FILE", help="write all figures there too; - prints them instead of tables")
    group.add_argument("--plot", metavar="FILE", help="draw a picture, as PNG")
    group.add_argument("--show", metavar="FILE", help="measure nothing: show what --json wrote")


def run(arguments: argparse.Namespace) -> int:
    """Measure and show; 1 if a backend failed or differs from plain torch."""
    if arguments.profile:
        return _profile(arguments)
    from minilm.bench.plots import plot
    from minilm.bench.report import table
    from minilm.plot_style import check_matplotlib

    if arguments.plot is not None:
        check_matplotlib()  # now, not after minutes of measuring
    report = _read(arguments.show) if arguments.show else _measure(arguments)
    _write_json(arguments.json, report)
    if arguments.json != "-":
        print(table(report, arguments.baseline))
    if arguments.plot is not None:
        with open_output(arguments.plot) as file:
            plot(report, file, arguments.baseline)
    failed = [engine for engine in report["engines"] if engine["role"] == "backend" and engine["status"] != "ok"]
    return 1 if failed else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the options say.

    Raises:
        UsageError: an option that can't be read.
    """
    from minilm.bench.settings import Settings

    try:
        threads = tuple(int(count) for count in _listed(arguments.threads) or ())
    except ValueError:
        raise UsageError(f"--threads takes whole numbers joined by commas, got {arguments.threads!r}") from None
    return Settings(
        backends=_listed(arguments.backend),
        peers=_listed(arguments.peers),
        workloads=_listed(arguments.workloads),
        device=arguments.device,
        model=arguments.model,
        dtype=arguments.dtype,
        threads=threads,
        data=arguments.data,
        seconds=arguments.seconds,
        min_cosine=arguments.min_cosine,
        baseline=arguments.baseline,
        sts=arguments.sts,
        parity=arguments.parity,
    )


def _listed(names: str | None) -> tuple[str, ...] | None:
    """Split names at commas; `none` is none."""
    if names is None:
        return None
    return tuple(name.strip() for name in names.split(",") if name.strip() and name.strip() != "none")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from minilm.bench.measure import run as measure

    return measure(_settings(arguments), _teller(arguments))


def _profile(arguments: argparse.Namespace) -> int:
    """Print or write where the time goes."""
    from minilm.bench.measure import run_profile
    from minilm.bench.report import profile_table

    if arguments.plot or arguments.show:
        raise UsageError("--profile goes with neither --plot nor --show")
    report = run_profile(_settings(arguments), _teller(arguments))
    _write_json(arguments.json, report)
    if arguments.json != "-":
        print(profile_table(report))
    return 0


def _teller(arguments: argparse.Namespace) -> Callable[[str], object]:
    """Return what says on stderr, unless it is to be quiet, what is being done and for how long we have been at it."""
    start = time.perf_counter()

    def tell(what: str) -> None:
        if not arguments.quiet:
            print(f"minilm bench: {time.perf_counter() - start:4.0f} s  {what}", file=sys.stderr)

    return tell


def _write_json(path: str | None, report: dict[str, Any]) -> None:
    """Write the report, complete or not at all, if there is somewhere to."""
    if path is not None:
        with open_output(path) as file:
            file.write((json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _read(path: str) -> dict[str, Any]:
    """Read what an earlier run wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        report: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or not {"engines", "results", "workloads"} <= report.keys():
        raise ValueError(f"{path} is no report of minilm bench")
    return report
