"""`morsr average`: the mean of several adapter files."""

from __future__ import annotations

import argparse
import sys

HELP = (
    "Average adapter files that began at the same weights: the last checkpoints of one run, or runs from one start. "
    "What an adversarial loss makes swing averages out. Settings and extra values are those of the first file."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", nargs="+", metavar="IN.safetensors", help="two adapter files or more")
    parser.add_argument("--out", required=True, metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per file (default: equal)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), help="of the stored ranks (default: the first file's)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the mean.

    Raises:
        MorsrError: fewer than two files, weights that do not fit them, files that do not belong together, or an output
            that is one of them.
    """
    import torch

    from morsr.adapters import average_adapters

    dtype = getattr(torch, options.dtype) if options.dtype else None
    print(average_adapters(options.inputs, options.out, weights=options.weights, dtype=dtype), file=sys.stderr)
    return 0
