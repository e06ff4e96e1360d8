"""`morsr upscale`: restore an image file, or a folder of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from morsr.commands._model import add_model_arguments, model_arguments
from morsr.errors import ConfigError, InputError

if TYPE_CHECKING:
    from morsr.restoring import Restorer, Settings
    from morsr.restoring.folder import Job

HELP = (
    "Restore and enlarge an image, or every image in a folder and its subfolders. Outputs keep their stem, format, "
    "mode and metadata; outputs that exist are skipped, so that a stopped run goes on where it was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("input", metavar="IN", help="image file or folder")
    parser.add_argument("output", metavar="OUT", help="image file (its suffix decides the format) or folder")
    add_model_arguments(parser)
    parser.add_argument("--scale", type=float, default=4.0, help="enlargement, 1 to 8 (default: 4)")
    parser.add_argument(
        "--tile",
        type=_tile,
        default="auto",
        metavar="PIXELS",
        help="side of tiles in output pixels, auto or none (default: auto)",
    )
    parser.add_argument(
        "--color", default="wavelet", choices=("wavelet", "adain", "none"), help="colour correction (default: wavelet)"
    )
    parser.add_argument("--color-strength", type=float, default=1.0, help="0 to 1 (default: 1)")
    parser.add_argument("--strength", type=float, default=1.0, help="factor on the routed ranks (default: 1)")
    parser.add_argument(
        "--routing", default="image", choices=("image", "tile"), help="one routing per image (default) or per tile"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--format", help="output format for all files: png, jpg, webp, tif, gif or bmp")
    parser.add_argument(
        "--batch", type=_batch, default="auto", metavar="N", help="images of equal size at once, in a folder"
    )
    parser.add_argument("--compile", action="store_true", help="compile the networks first (needs a C++ compiler)")
    parser.add_argument("--overwrite", action="store_true", help="restore again what exists already")


def run(options: argparse.Namespace) -> int:
    """Restore what was asked for; 1 if some files failed.

    Raises:
        MorsrError: nothing to do, a wrong setting, or a model that cannot be loaded, before any file is touched; and
            for a single file whatever went wrong with it.
    """
    from morsr.imaging.listing import unread_images
    from morsr.restoring import Settings
    from morsr.restoring.folder import Job, check_jobs, folder_jobs, output_name, processes

    settings = Settings(
        scale=options.scale, tile=options.tile, color=options.color, color_strength=options.color_strength,
        strength=options.strength, routing=options.routing,
    )  # fmt: skip
    source, target = Path(options.input).expanduser(), Path(options.output).expanduser()
    if source.is_dir():
        jobs = folder_jobs(source, target, options.format)
    elif source.is_file():
        into_folder = target.is_dir() or options.output.endswith("/") or (not target.suffix and not options.format)
        jobs = [Job(source, target / output_name(source, options.format) if into_folder else target)]
        if options.batch != "auto":
            raise ConfigError("--batch goes with a folder of images; a file is restored by itself")
        _check_suffix(jobs[0].target, options.format)
    else:
        raise InputError(f"{source}: no such file or folder")
    check_jobs(jobs, options.format)
    index, count = processes()
    if index and source.is_file():
        return 0
    jobs = jobs[index::count]

    waiting = [job for job in jobs if options.overwrite or not job.target.exists()]
    if skipped := len(jobs) - len(waiting):
        _say(
            f"{skipped} of {len(jobs)} outputs exist and are kept, whatever made them; --overwrite restores them again"
        )
    if source.is_dir() and index == 0 and (left_out := unread_images(source)):
        _say(left_out)
    if not waiting:
        return 0

    from morsr.restoring import Restorer

    chosen = model_arguments(options)
    restorer = Restorer.from_pretrained(
        chosen.pop("name_or_path"), **chosen, device=options.device, dtype=options.dtype, compile=options.compile
    )
    settings.check_model(restorer.generator)
    if source.is_file():
        _restore_one(restorer, waiting[0], settings, options.format)
        return 0
    return _restore_all(restorer, waiting, settings, options)


def _check_suffix(target: Path, format: str | None) -> None:
    """Refuse a --format that the name of the output contradicts."""
    from morsr.imaging.files import file_format
    from morsr.imaging.listing import FORMATS

    said = FORMATS.get(target.suffix.lower())
    if format and said not in (None, file_format(target, format)):
        raise ConfigError(f"--format {format} contradicts the name {target}; leave one of them out")


def _restore_one(restorer: Restorer, job: Job, settings: Settings, format: str | None) -> None:
    from tqdm import tqdm

    with tqdm(unit="tile", desc=job.source.name, leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n if done > bar.n else 0)

        restorer.restore_file(*job, format=format, progress=progress, **vars(settings))
    _say(f"{job.target}")


def _restore_all(restorer: Restorer, waiting: list[Job], settings: Settings, options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from morsr.restoring.folder import restore_files

    outcomes = restore_files(restorer, waiting, settings, format=options.format, batch=options.batch)
    failed = [
        str(outcome)
        for outcome in tqdm(outcomes, total=len(waiting), unit="image", disable=None)
        if outcome.error is not None
    ]
    _say(f"{len(waiting) - len(failed)} of {len(waiting)} images restored")
    if failed:
        _say(f"{len(failed)} failed:\n  " + "\n  ".join(sorted(failed)))
    return 1 if failed else 0


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto, none or a number of pixels, got {text!r}") from None


def _batch(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number of images from 1, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
