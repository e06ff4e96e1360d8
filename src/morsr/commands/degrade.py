"""`morsr degrade`: low-quality images by a recipe, with the parameters that made them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from morsr.commands._common import existing, report_failures, say
from morsr.errors import InputError, MorsrError
from morsr.files import atomic_path, printable, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL import Image

    from morsr.degradation import DegradationRecipe

PARAMETERS = "parameters.jsonl"
SHEET_IMAGES = 24
_COLUMNS, _TILE, _MARGIN, _CAPTION = 3, 192, 8, 30


def run(
    input: Path,
    output: Path,
    *,
    recipe: str = "realesrgan",
    seed: int = 0,
    scale: PositiveInt = 4,
    hr: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> int:
    """Make low-quality images from sharp ones by a degradation recipe; 1 if some could not be read.

    Writes PNG files, parameters.jsonl with one line of true parameters per image, and contact_sheet.png. The result for
    an image depends on its name and the seed alone: its path within the folder without suffix (sub/c), or the file's
    name (c). The same command resumes a stopped run.

    Args:
        input: image file or folder of sharp images
        output: folder for the low-quality images
        recipe: preset or .yaml file
        seed: other seeds give other degradations
        scale: HR pixels per LR pixel
        hr: folder for the sharp images, cropped so that the pairs fit
        device: cpu, cuda, cuda:1, mps, …; noise differs between kinds of device
        overwrite: replace outputs that exist

    Raises:
        MorsrError: a wrong recipe or setting, nothing to do, outputs that exist or cannot be written; before any work.
    """
    from morsr.degradation import DegradationRecipe
    from morsr.degradation.keys import check_seed
    from morsr.imaging.listing import CONTACT_SHEET, unread_images
    from morsr.restoring.devices import resolve_device

    loaded = DegradationRecipe.load(recipe)
    check_seed(seed)
    resolve_device(device)
    images = _plan(existing(input), [output] if hr is None else [output, hr])
    made = {"recipe": loaded.name, "recipe_hash": loaded.hash, "seed": seed, "scale": scale}
    lines = {} if overwrite else _finished(output, hr, made)
    resumed = (output / PARAMETERS).is_file()
    _check_outputs([image for image in images if image[1] not in lines], output, hr, overwrite or resumed)

    from tqdm import tqdm

    if lines:
        say(f"{len(lines)} of {len(images)} images are degraded already and are kept")
    failed: list[str] = []
    write_text(output / PARAMETERS, "".join(lines.values()))
    with (output / PARAMETERS).open("a", encoding="utf-8") as file:
        for path, stem in tqdm(images, unit="image", disable=None):
            if stem in lines:
                continue
            try:
                sharp, low, lines[stem] = _degrade_file(path, stem, loaded, made, device)
            except InputError as error:
                failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
                continue
            _save(low, output / f"{stem}.png")
            if hr is not None:
                _save(sharp, hr / f"{stem}.png")
            file.write(lines[stem])
            file.flush()
    if lines:
        shown = [_shown(path, stem, output, lines[stem], scale) for path, stem in images if stem in lines][
            :SHEET_IMAGES
        ]
        with atomic_path(output / CONTACT_SHEET) as part:
            contact_sheet(shown).save(part)
    else:
        (output / PARAMETERS).unlink()
    say(f"{len(lines)} of {len(images)} images degraded into {output}")
    if input.is_dir() and (left_out := unread_images(input)):
        say(left_out)
    return report_failures(failed)


def _finished(target: Path, hr: Path | None, made: dict[str, Any]) -> dict[str, str]:
    """Lines of parameters by stem of the images that an earlier run with the same settings has finished.

    Raises:
        InputError: the folder holds outputs of other settings.
    """
    record = target / PARAMETERS
    if not record.is_file():
        return {}
    found: dict[str, str] = {}
    for line in record.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
            same = {name: row[name] for name in made} == made
            name = str(row["file"])
        except (ValueError, KeyError, TypeError):
            break  # a line that was cut off by a kill
        if not same:
            raise InputError(
                f"{record}: exists, of another recipe, seed or scale; choose an empty folder, or --overwrite"
            )
        if line.endswith("\n") and all((folder / name).is_file() for folder in (target, hr) if folder):
            found[name.removesuffix(".png")] = line
    return found


def _plan(source: Path, outputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Image files with the stems of their outputs, which keep the subfolder."""
    from morsr.data.sources import find_images

    if source.is_file():
        _refuse_contact_sheets([source])
        return [(source, source.stem)]
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
    from morsr.imaging.listing import CONTACT_SHEET

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
        there = [path for path in outputs if path.exists()]
        if there and not overwrite:
            raise InputError(f"{there[0]}: exists; choose an empty folder, or --overwrite")
    for folder in folders:
        output_folder(folder)


def _degrade_file(
    path: Path, stem: str, recipe: DegradationRecipe, made: dict[str, Any], device: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """The cropped HR and the LR image as uint8 (H, W, 3), and the line of parameters."""
    import torch
    from einops import rearrange

    from morsr.data.dataset import image_key, to_tensor
    from morsr.data.sources import crop_to_multiple
    from morsr.degradation import apply, degradation_measures, true_severity
    from morsr.imaging import read_rgb

    hr = crop_to_multiple(read_rgb(path), made["scale"])
    parameters = recipe.sample(torch.tensor([image_key(stem, made["seed"])]))
    images = to_tensor(hr).to(device).unsqueeze(0).float() / 255
    lr = apply(images, parameters, scale=made["scale"])
    low = rearrange(lr[0] * 255, "c h w -> h w c").round().to(torch.uint8).cpu().numpy()

    severity = true_severity(parameters, recipe, scale=made["scale"])
    measures = degradation_measures(parameters, scale=made["scale"])
    extra = {
        "file": f"{stem}.png",
        "source": path.name,
        **made,
        "severity": {name: round(value.item(), 5) for name, value in severity._asdict().items()},
        "measures": {name: round(value.item(), 5) for name, value in measures._asdict().items()},
    }
    return hr, low, parameters.to_jsonl(extra=[extra])


def _shown(path: Path, stem: str, target: Path, line: str, scale: int) -> tuple[Image.Image, Image.Image, str]:
    """The tiles and the caption of one image on the contact sheet."""
    from morsr.data.sources import crop_to_multiple
    from morsr.imaging import read_rgb

    row = json.loads(line)
    measures = row["measures"]
    caption = (
        f"{printable(Path(stem).name)}  severity {row['severity']['combined']:.2f}\nblur {measures['blur']:.1f} px  "
        f"noise {measures['noise']:.0f}  JPEG {measures['jpeg']:.0f}  grid {measures['resize']:.2f}"
    )
    return (*tiles(crop_to_multiple(read_rgb(path), scale), read_rgb(target / f"{stem}.png")), caption)


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
