"""`morsr degrade`: low-quality images by a recipe, with the parameters that made them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from morsr.commands._common import existing, report_failures, say
from morsr.errors import InputError
from morsr.files import printable, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from morsr.degradation import DegradationParameters, DegradationRecipe

PARAMETERS = "parameters.jsonl"


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

    Writes PNG files and parameters.jsonl with one line of true parameters per image. The result for an image depends on
    its name and the seed alone: its path within the folder without suffix (sub/c), or the file's name (c). The same
    command resumes a stopped run.

    Args:
        input: image file or folder of sharp images
        output: folder for the low-quality images
        recipe: preset or .yaml file
        seed: other seeds give other degradations
        scale: HR pixels per LR pixel
        hr: folder for the sharp images, cropped so that the pairs fit
        device: cpu, cuda, cuda:1, mps, …; noise differs between kinds of device
        overwrite: replace outputs that exist
    """
    import torch
    from tqdm import tqdm

    from morsr.data.dataset import image_key
    from morsr.data.sources import crop_to_multiple
    from morsr.degradation import DegradationRecipe, apply
    from morsr.degradation.keys import check_seed
    from morsr.evaluation.images import to_tensor, to_uint8
    from morsr.imaging import read, read_rgb, write
    from morsr.restoring.devices import resolve_device

    loaded, where = DegradationRecipe.load(recipe), resolve_device(device)
    check_seed(seed)
    folders = [output] if hr is None else [output, hr]
    sources = _plan(existing(input), folders)
    keys = torch.tensor([image_key(name.removesuffix(".png"), seed) for name in sources])
    parameters, record = loaded.sample(keys), output / PARAMETERS
    pairs = None if hr is None else os.path.relpath(hr, output)
    lines = _described(parameters, loaded, sources, seed=seed, scale=scale, hr=pairs)
    there = [folder / name for name in sources for folder in folders if (folder / name).exists()]
    if overwrite:
        record.unlink(missing_ok=True)
    elif record.is_file():
        if not set(record.read_text(encoding="utf-8", errors="replace").splitlines()) <= set(lines):
            raise InputError(
                f"{record}: of other images, recipe, seed, scale or --hr; choose an empty folder, or --overwrite"
            )
    elif there:
        raise InputError(f"{there[0]}: exists; choose an empty folder, or --overwrite")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if not overwrite:  # before the images, so that a stopped run resumes
        write_text(record, "".join(f"{line}\n" for line in lines))
    failed: dict[str, str] = {}
    for place, (name, path) in enumerate(tqdm(sources.items(), unit="image", disable=None)):
        if not overwrite and all((folder / name).is_file() for folder in folders):
            continue
        try:
            sharp = crop_to_multiple(read_rgb(path), scale)
            low = to_uint8(apply(to_tensor(sharp).to(where), parameters[place], scale=scale))
        except InputError as error:
            failed[name] = str(error) if printable(str(path)) in str(error) else f"{path}: {error}"
            continue
        for folder, image in zip(folders, (low, sharp), strict=False):
            write(read(image), folder / name)
    made = [line for name, line in zip(sources, lines, strict=True) if name not in failed]
    write_text(record, "".join(f"{line}\n" for line in made))
    say(f"{len(made)} of {len(lines)} images degraded into {output}")
    return report_failures(failed.values())


def _plan(source: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """Name of an output, which keeps the subfolder, to its input."""
    from morsr.restoring.folder import check_jobs, jobs_into

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"--hr {folders[1]}: expected another folder than that of the low-quality images")
    for folder in folders:
        if source.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise InputError(f"{folder}: lies among the inputs; choose a folder outside of {source}")
        check_jobs(jobs := jobs_into(folder, source, "png"))
    return {job.target.relative_to(folder).as_posix(): job.source for job in jobs}


def _described(
    parameters: DegradationParameters, recipe: DegradationRecipe, sources: Mapping[str, Path], **settings: Any
) -> list[str]:
    """A line of JSON for every image: what is done to it, by which settings, and how bad that is."""
    from morsr.degradation import degradation_measures, true_severity

    severity = true_severity(parameters, recipe, scale=settings["scale"])
    measures = degradation_measures(parameters, scale=settings["scale"])
    known: dict[str, Any] = {"severity": severity, "measures": measures}
    called = {"recipe": getattr(recipe, "name", type(recipe).__name__), "recipe_hash": getattr(recipe, "hash", "")}
    lines = []
    for place, ((name, path), row) in enumerate(zip(sources.items(), parameters.rows(), strict=True)):
        numbers = {
            what: {key: round(value[place].item(), 5) for key, value in values._asdict().items()}
            for what, values in known.items()
        }
        lines.append(json.dumps({"file": name, "source": path.name, **called, **settings, **numbers, **row}))
    return lines
