"""`morsr score`: metrics of restored images, with a named protocol."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from morsr.files import user_path

HELP = "score folders of restored images (PSNR, SSIM, NIQE and others) and write CSV, JSON and Markdown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--pred",
        nargs="+",
        action="extend",
        metavar="[NAME=]PATH",
        help="restored images: folders, or single files; NAME is the row's",
    )
    parser.add_argument("--gt", type=user_path, metavar="PATH", help="references of the same paths without suffix")
    parser.add_argument(
        "--lr", type=user_path, metavar="PATH", help="inputs of the same paths without suffix: adds the bicubic row"
    )
    parser.add_argument("--metrics", default="psnr,ssim,niqe", help="names with commas (default: %(default)s)")
    parser.add_argument("--out", type=user_path, default=Path("scores"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--published", metavar="DATA SET", help="print published rows beside, such as realsr")
    parser.add_argument("--crop", action="store_true", help="crop pairs of different sizes to the common top left part")
    parser.add_argument("--skip-problems", action="store_true", help="score the rest when files cannot be scored")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: one per core)")
    parser.add_argument("--accelerator", action="store_true", help="run learned metrics on the accelerator, if any")
    parser.add_argument("--no-download", action="store_true", help="never fetch weights of metrics")
    parser.add_argument("--list-metrics", action="store_true", help="print the metrics and what they need, and stop")


def run(args: argparse.Namespace) -> int:
    """Score, write the files, print the table. Returns 1 when an image failed on the way, else 0."""
    from morsr.errors import ConfigError
    from morsr.models.metrics import METRICS

    if args.list_metrics:
        for info in METRICS.values():
            weights = ", ".join(info.weights) or "none"
            print(f"{info.label}\n    {info.source}\n    range {info.range}; weights: {weights}")
        print("and every other name of pyiqa, with its default settings")
        return 0
    if not args.pred:
        raise ConfigError("score: expected restored images, --pred DIR")

    import torch

    from morsr.evaluation.score import score_folders
    from morsr.evaluation.tables import published_rows

    device = torch.accelerator.current_accelerator() if args.accelerator else None
    report = score_folders(
        named_paths(args.pred),
        args.gt,
        args.lr,
        [name for name in args.metrics.split(",") if name.strip()],
        out=args.out,
        processes=args.jobs if args.jobs is not None else _cores(),
        crop=args.crop,
        skip_problems=args.skip_problems,
        device=device,
        download=not args.no_download,
        published=published_rows(args.published) if args.published else (),
    )
    print(report.to_text())
    print(f"Written to {args.out}: scores.csv, scores.json, scores.md")
    return 1 if report.incomplete else 0


def named_paths(texts: list[str]) -> dict[str, Path]:
    """Row name to path, from `PATH` (called after its last part) or `NAME=PATH`.

    Raises:
        ConfigError: two rows of one name, or a row without one.
    """
    from morsr.errors import ConfigError

    found: dict[str, Path] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        path = whole = Path(text).expanduser()
        if rest and not whole.exists():
            path = Path(rest).expanduser()
        else:
            name = path.resolve().stem if path.is_file() else path.resolve().name
        if not name.strip():
            raise ConfigError(f"score: expected a name for the row, --pred NAME={path}, got {text!r}")
        if name in found:
            raise ConfigError(f"score: two rows would be called {name!r}; name them: --pred NAME={path}")
        found[name] = path
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
