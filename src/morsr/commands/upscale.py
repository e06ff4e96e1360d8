"""`morsr upscale`: restore an image file, or a folder of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morsr.errors import InputError, MorsrError

if TYPE_CHECKING:
    from morsr.models.restorer import Restorer

HELP = (
    "Restore and enlarge an image, or every image in a folder and its subfolders. Outputs keep their stem, format, "
    "mode and metadata; outputs that exist are skipped, so that a stopped run goes on where it was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("input", metavar="IN", help="image file or folder")
    parser.add_argument("output", metavar="OUT", help="image file (its suffix decides the format) or folder")
    parser.add_argument("--model", default="tiny", help="shipped preset, adapters file, saved folder or checkpoint")
    parser.add_argument("--base", help="folder or hub id of the base model, if the adapters do not bring it")
    parser.add_argument("--scale", type=float, default=4.0, help="enlargement, 1 to 8 (default: 4)")
    parser.add_argument(
        "--tile", type=_tile, default="auto", metavar="PIXELS", help="side of tiles in output pixels, auto or none"
    )
    parser.add_argument("--color", default="wavelet", choices=("wavelet", "adain", "none"), help="colour correction")
    parser.add_argument("--color-strength", type=float, default=1.0, help="0 to 1 (default: 1)")
    parser.add_argument("--generative", type=float, default=1.0, help="factor on the routed ranks (default: 1)")
    parser.add_argument("--budget", type=int, help="at most so many routed ranks per layer")
    parser.add_argument(
        "--routing", default="image", choices=("image", "tile", "sequence"),
        help="one routing per image, per tile, or the first image's for all (video frames)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--format", help="output format for all files: png, jpg, webp, tif or bmp")
    parser.add_argument("--overwrite", action="store_true", help="restore again what exists already")


def run(options: argparse.Namespace) -> int:
    """Restore what was asked for; 1 if some files failed.

    Raises:
        MorsrError: nothing to do, a wrong setting, or a model that cannot be loaded, before any file is touched; and
            for a single file whatever went wrong with it.
    """
    source, target = Path(options.input).expanduser(), Path(options.output).expanduser()
    if source.is_dir():
        pairs = folder_pairs(source, target, options.format)
    elif source.is_file():
        into_folder = target.is_dir() or options.output.endswith("/") or (not target.suffix and not options.format)
        pairs = [(source, target / output_name(source, options.format) if into_folder else target)]
    else:
        raise InputError(f"{source}: no such file or folder")
    check_pairs(pairs, options.format)

    waiting = [(one, other) for one, other in pairs if options.overwrite or not other.exists()]
    if skipped := len(pairs) - len(waiting):
        _say(f"{skipped} of {len(pairs)} outputs exist and are kept; --overwrite restores them again")
    if not waiting:
        return 0

    from morsr.models.restorer import Restorer

    restorer = Restorer.from_pretrained(options.model, base=options.base, device=options.device, dtype=options.dtype)
    settings = {
        "scale": options.scale,
        "tile": options.tile,
        "color": options.color,
        "color_strength": options.color_strength,
        "generative": options.generative,
        "budget": options.budget,
        "routing": options.routing,
        "format": options.format,
    }
    restorer.check(**{name: value for name, value in settings.items() if name != "format"})
    if source.is_file():
        _restore_one(restorer, *waiting[0], settings)
        return 0
    return _restore_all(restorer, waiting, settings)


def _restore_one(restorer: Restorer, source: Path, target: Path, settings: dict[str, Any]) -> None:
    from tqdm import tqdm

    with tqdm(unit="tile", desc=source.name, leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n if done > bar.n else 0)

        restorer.restore_file(source, target, progress=progress, **settings)
    _say(f"{target}")


def _restore_all(restorer: Restorer, pairs: list[tuple[Path, Path]], settings: dict[str, Any]) -> int:
    from tqdm import tqdm

    failed: list[str] = []
    for source, target in tqdm(pairs, unit="image", disable=None):
        try:
            restorer.restore_file(source, target, **settings)
        except InputError as error:
            failed.append(str(error) if str(source) in str(error) else f"{source}: {error}")
        except MorsrError as error:
            failed.append(f"{source}: {error}")
    _say(f"{len(pairs) - len(failed)} of {len(pairs)} images restored")
    if failed:
        _say(f"{len(failed)} failed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


def folder_pairs(source: Path, target: Path, format: str | None) -> list[tuple[Path, Path]]:
    """Image files under a folder with their outputs, which keep their subfolder and stem.

    Raises:
        InputError: the target is a file or the same folder, or there is no image.
    """
    from morsr.models.picture_files import FORMATS

    if target.is_file():
        raise InputError(f"{target}: the input is a folder, so the output must be one too; this is a file")
    inside, outside = source.resolve(), target.resolve()
    if inside == outside:
        raise InputError(f"{target}: the outputs would overwrite the inputs; choose another folder")
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in FORMATS
        and path.is_file()
        and not path.name.startswith(".")
        and outside not in path.resolve().parents
    ]
    if not found:
        raise InputError(f"{source}: no images ({', '.join(sorted(FORMATS))}) in this folder")
    return [(path, target / path.relative_to(source).parent / output_name(path, format)) for path in found]


def output_name(source: Path, format: str | None) -> str:
    """The file name of an image's output: its own, or its stem with the suffix of the format."""
    return f"{source.stem}.{format.lower().lstrip('.')}" if format else source.name


def check_pairs(pairs: list[tuple[Path, Path]], format: str | None) -> None:
    """Check all outputs before the first is made.

    Raises:
        InputError: two inputs with one output, an output that is an input, or a format that cannot be written.
    """
    from morsr.models.picture_files import file_format

    seen: dict[Path, Path] = {}
    inputs = {source.resolve() for source, _ in pairs}
    for source, target in pairs:
        file_format(target, format)
        place = target.resolve()
        if place in inputs:
            raise InputError(f"{target}: this output would overwrite an input")
        if place in seen:
            raise InputError(
                f"{seen[place]} and {source} would both become {target}; rename one, or leave out --format"
            )
        seen[place] = source


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto, none or a number of pixels, got {text!r}") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)
