"""`morsr degrade`: low-quality images by a recipe, with the parameters that made them."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morsr.errors import ConfigError, InputError, MorsrError
from morsr.files import atomic_path, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL import Image

    from morsr.degradation import DegradationRecipe

HELP = (
    "Make low-quality images from sharp ones by a degradation recipe: a folder of PNG files, parameters.jsonl with one "
    "line of true parameters per image, and contact_sheet.png. The result for an image depends on its name and the "
    "seed alone, not on the images around it; the name is the path within the folder without its suffix (sub/c), or "
    "that of the file alone (c) where IN is one file."
)

PARAMETERS = "parameters.jsonl"
SHEET_IMAGES = 24
_COLUMNS, _TILE, _MARGIN, _CAPTION = 3, 192, 8, 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("input", metavar="IN", help="image file or folder of sharp images")
    parser.add_argument("output", metavar="OUT", help="folder for the low-quality images")
    parser.add_argument("--recipe", default="realesrgan", help="preset or .yaml file (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="other seeds give other degradations (default: %(default)s)"
    )
    parser.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel (default: %(default)s)")
    parser.add_argument("--hr", metavar="DIR", help="also write the sharp images, cropped so that the pairs fit")
    parser.add_argument(
        "--device", default="cpu",
        help="cpu, cuda, cuda:1, mps, …; noise differs between kinds of device (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def run(options: argparse.Namespace) -> int:
    """Degrade every image; 1 if some could not be read.

    Raises:
        MorsrError: a wrong recipe or setting, nothing to do, outputs that exist or cannot be written; before any work.
    """
    from morsr.data.images import CONTACT_SHEET
    from morsr.degradation import DegradationRecipe
    from morsr.degradation.keys import check_seed
    from morsr.imaging.listing import unread_images
    from morsr.restoring.devices import resolve_device

    recipe = DegradationRecipe.load(options.recipe)
    if options.scale < 1:
        raise ConfigError(f"--scale: expected a whole number of at least 1, got {options.scale}")
    check_seed(options.seed)
    resolve_device(options.device)
    target = Path(options.output).expanduser()
    hr_folder = Path(options.hr).expanduser() if options.hr else None
    source = Path(options.input).expanduser()
    images = _plan(source, [target] if hr_folder is None else [target, hr_folder])
    _check_outputs(images, target, hr_folder, options.overwrite)

    from tqdm import tqdm

    lines: list[str] = []
    shown: list[tuple[Image.Image, Image.Image, str]] = []
    failed: list[str] = []
    for path, stem in tqdm(images, unit="image", disable=None):
        try:
            hr, lr, line, caption = _degrade_file(path, stem, recipe, options)
        except InputError as error:
            failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        _save(lr, target / f"{stem}.png")
        if hr_folder is not None:
            _save(hr, hr_folder / f"{stem}.png")
        lines.append(line)
        if len(shown) < SHEET_IMAGES:
            shown.append((*tiles(hr, lr), caption))
    if lines:
        write_text(target / PARAMETERS, "".join(lines))
        with atomic_path(target / CONTACT_SHEET) as part:
            contact_sheet(shown).save(part)
    _say(f"{len(lines)} of {len(images)} images degraded into {target}")
    if source.is_dir() and (left_out := unread_images(source)):
        _say(left_out)
    if failed:
        _say(f"{len(failed)} failed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


def _plan(source: Path, outputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Image files with the stems of their outputs, which keep the subfolder."""
    from morsr.data.images import find_images

    if source.is_file():
        _refuse_contact_sheets([source])
        return [(source, source.stem)]
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    paths = [Path(path) for path in find_images(source)]
    _refuse_outputs_among(source, paths, outputs)
    _refuse_contact_sheets(paths)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_stem[path.relative_to(source).with_suffix("").as_posix()].append(path)
    twins = [", ".join(path.name for path in found) for found in by_stem.values() if len(found) > 1]
    if twins:
        raise InputError(f"{source}: images of one name would share an output: {'; '.join(twins[:5])}")
    return [(found[0], stem) for stem, found in by_stem.items()]


def _refuse_contact_sheets(paths: Sequence[Path]) -> None:
    """Raise InputError where an output would have the name of the contact sheet."""
    from morsr.data.images import CONTACT_SHEET

    for path in paths:
        if path.stem == Path(CONTACT_SHEET).stem:
            raise InputError(f"{path}: its output would be called {CONTACT_SHEET}, as the overview; rename it")


def _refuse_outputs_among(source: Path, paths: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise InputError where outputs of this run, or of an earlier one, would be taken for sharp images."""
    folders = {parent.resolve() for path in paths for parent in path.parents} | set(source.resolve().parents)
    for folder in outputs:
        if folder.resolve() in folders or source.resolve() in folder.resolve().parents:
            raise InputError(
                f"{folder}: the outputs would lie among the inputs; choose a folder that is neither in {source} nor "
                "around it"
            )
    below = {parent for path in paths for parent in path.relative_to(source).parents} - {Path()}
    made = sorted(source / folder for folder in below if (source / folder / PARAMETERS).is_file())
    if made:
        raise InputError(
            f"{made[0]}: holds {PARAMETERS}, so outputs of an earlier run lie among the inputs; move this folder, and "
            f"that of the sharp images if it had one, out of {source}"
        )


def _check_outputs(images: Sequence[tuple[Path, str]], target: Path, hr: Path | None, overwrite: bool) -> None:
    from morsr.files import output_folder

    folders = [target] if hr is None else [target, hr]
    if hr is not None and hr.resolve() == target.resolve():
        raise InputError(f"--hr {hr}: expected another folder than the one of the low-quality images")
    sources = {path.resolve() for path, _ in images}
    for folder in folders:
        outputs = [folder / f"{stem}.png" for _, stem in images]
        overlapping = [path for path in outputs if path.resolve() in sources]
        if overlapping:
            raise InputError(f"{overlapping[0]}: is one of the inputs; choose another output folder")
        existing = [path for path in (*outputs, folder / PARAMETERS) if path.exists()]
        if existing and not overwrite:
            raise InputError(f"{existing[0]}: exists; choose an empty folder, or --overwrite")
    for folder in folders:
        output_folder(folder)


def _degrade_file(
    path: Path, stem: str, recipe: DegradationRecipe, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, str, str]:
    """The cropped HR and the LR image as uint8 (H, W, 3), the line of parameters, the caption."""
    import torch
    from einops import rearrange

    from morsr.data.dataset import image_key, to_tensor
    from morsr.data.images import load_image
    from morsr.data.sources import crop_to_multiple
    from morsr.degradation import apply, degradation_measures, true_severity
    from morsr.files import printable

    hr = crop_to_multiple(load_image(path), options.scale)
    parameters = recipe.sample(torch.tensor([image_key(stem, options.seed)]))
    images = to_tensor(hr).to(options.device).unsqueeze(0).float() / 255
    made = apply(images, parameters, scale=options.scale)
    lr = rearrange(made[0] * 255, "c h w -> h w c").round().to(torch.uint8).cpu().numpy()

    severity = true_severity(parameters, recipe, scale=options.scale)
    measures = degradation_measures(parameters, scale=options.scale)
    extra = {
        "file": f"{stem}.png",
        "source": path.name,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "seed": options.seed,
        "scale": options.scale,
        "severity": {name: round(value.item(), 5) for name, value in severity._asdict().items()},
        "measures": {name: round(value.item(), 5) for name, value in measures._asdict().items()},
    }
    caption = (
        f"{printable(Path(stem).name)}  severity {severity.combined.item():.2f}\nblur {measures.blur.item():.1f} px  "
        f"noise {measures.noise.item():.0f}  JPEG {measures.jpeg.item():.0f}  grid {measures.resize.item():.2f}"
    )
    return hr, lr, parameters.to_jsonl(extra=[extra]), caption


def tiles(hr: np.ndarray, lr: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """The centre of an HR and an LR image, uint8 (H, W, 3), for a sheet: so large that single LR pixels can be seen."""
    from PIL import Image

    side = min(*lr.shape[:2], _TILE // 2)
    up, over = (lr.shape[0] - side) // 2, (lr.shape[1] - side) // 2
    ratio = hr.shape[0] // lr.shape[0]
    sharp = hr[up * ratio : (up + side) * ratio, over * ratio : (over + side) * ratio]
    low = lr[up : up + side, over : over + side]
    return (
        Image.fromarray(sharp).resize((_TILE, _TILE), Image.Resampling.LANCZOS),
        Image.fromarray(low).resize((_TILE, _TILE), Image.Resampling.NEAREST),
    )


def contact_sheet(shown: Sequence[tuple[Image.Image, Image.Image, str]]) -> Image.Image:
    """One picture of several pairs: HR on the left, LR enlarged without smoothing on the right, captions below.

    Args:
        shown: the two tiles of each pair, and its caption.
    """
    from PIL import Image, ImageDraw

    width, height = 2 * _TILE + _MARGIN, _TILE + _CAPTION
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for place, (*pair, caption) in enumerate(shown):
        left = _MARGIN + place % columns * (width + _MARGIN)
        top = _MARGIN + place // columns * (height + _MARGIN)
        for column, tile in enumerate(pair):
            sheet.paste(tile, (left + column * (_TILE + _MARGIN), top))
        draw.multiline_text((left, top + _TILE + 3), caption, fill=(0, 0, 0), spacing=1)
    return sheet


def _save(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    try:
        with atomic_path(path) as part:
            Image.fromarray(image).save(part)
    except OSError as error:
        raise MorsrError(f"{path}: cannot be written ({error})") from error


def _say(message: Any) -> None:
    print(message, file=sys.stderr)
