"""`minilm parity`: is a backend right?"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from minilm.cli.common import Commands, Parser, add_command, add_model_options, load_encoder, print_json, shows_progress

EPILOG = """\
Each operation, its gradients and whole vectors are computed by the backend, by plain torch at the same dtype, and in
float64, on the real weights. An error may be twice plain torch's, plus a floor of a few roundings. Exit code 1 if any
is larger.

examples:
  minilm parity --backend own_attention.py:OwnAttention
  minilm parity --backend triton --device cuda
  minilm parity --backend my_package.kernels:Mine --dtype float16 --json
  TRITON_INTERPRET=1 minilm parity --backend triton --quick     (without a GPU; takes minutes)
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `parity`."""
    summary = "check a backend against float64 and plain torch"
    parser = add_command(commands, "parity", run, summary=summary, epilog=EPILOG)
    parser.add_argument("--quick", action="store_true", help="leave out the larger cases")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table of errors, and return 1 if one is too large."""
    from minilm.model import floating_dtype
    from minilm.parity import check_parity
    from minilm.quantization import calibration_sentences

    dtypes = [floating_dtype(arguments.dtype)] if arguments.dtype else None
    choice, arguments.backend, arguments.dtype = arguments.backend, "torch", "float32"
    encoder = load_encoder(arguments)
    texts = calibration_sentences()[: 8 if arguments.quick else None]
    progress = shows_progress(arguments)
    rows = check_parity(encoder, choice, texts, dtypes=dtypes, quick=arguments.quick, show_progress_bar=progress)
    failed = sum(not row.ok for row in rows)
    if arguments.json:
        print_json([{**asdict(row), "error": _number(row.error), "ok": row.ok} for row in rows])
        return 1 if failed else 0
    width = max(len(row.operation) for row in rows)
    print(f"{'operation':<{width}}  dtype     worst case     error    plain torch  limit")
    for row in rows:
        figures = f"{row.error:<8.1e} {row.plain:<12.1e} {row.limit:<8.1e}"
        verdict = "ok" if row.ok else f"FAILED{f': {row.failure}' if row.failure else ''}"
        print(f"{row.operation:<{width}}  {row.dtype:<8}  {row.case:<13}  {figures} {verdict}")
    print(f"{len(rows) - failed} of {len(rows)} within their limits")
    return 1 if failed else 0


def _number(error: float) -> float | None:
    """JSON has no NaN."""
    return error if error == error else None
