"""`morsr degrade`: low-quality images by a recipe, with the parameters that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from morsr.commands._common import existing, report_failures, say
from morsr.errors import InputError
from morsr.files import printable, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from morsr.degradation import DegradationRecipe

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
    from tqdm import tqdm

    from morsr.degradation import DegradationRecipe
    from morsr.degradation.keys import check_seed
    from morsr.imaging import read, write
    from morsr.restoring.devices import resolve_device

    loaded = DegradationRecipe.load(recipe)
    check_seed(seed)
    resolve_device(device)
    folders = [output] if hr is None else [output, hr]
    sources = _plan(existing(input), folders)
    made = {"recipe": loaded.name, "recipe_hash": loaded.hash, "seed": seed, "scale": scale}
    lines = {} if overwrite else _finished(folders, made)
    if not (overwrite or (output / PARAMETERS).is_file()):
        for folder in folders:
            if there := [name for name in sources if (folder / name).exists()]:
                raise InputError(f"{folder / there[0]}: exists; choose an empty folder, or --overwrite")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if lines:
        say(f"{len(lines)} of {len(sources)} images are degraded already and are kept")
    failed: list[str] = []
    write_text(output / PARAMETERS, "".join(lines.values()))
    with (output / PARAMETERS).open("a", encoding="utf-8") as file:
        for name, path in tqdm(sources.items(), unit="image", disable=None):
            if name in lines:
                continue
            try:
                sharp, low, lines[name] = _degraded(path, name, loaded, made, device)
            except InputError as error:
                failed.append(str(error) if printable(str(path)) in str(error) else f"{path}: {error}")
                continue
            for folder, image in zip(folders, (low, sharp), strict=False):
                write(read(image), folder / name)
            file.write(lines[name])
            file.flush()
    if not lines:
        (output / PARAMETERS).unlink()
    say(f"{len(lines)} of {len(sources)} images degraded into {output}")
    return report_failures(failed)


def _plan(source: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """Name of an output, which keeps the subfolder, to its input."""
    from morsr.restoring.folder import Job, check_jobs, folder_jobs

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"--hr {folders[1]}: expected another folder than that of the low-quality images")
    for folder in folders:
        if source.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise InputError(f"{folder}: lies among the inputs; choose a folder outside of {source}")
        single = [Job(source, folder / f"{source.stem}.png")]
        jobs = folder_jobs(source, folder, "png") if source.is_dir() else single
        check_jobs(jobs)
    return {job.target.relative_to(folder).as_posix(): job.source for job in jobs}


def _finished(folders: Sequence[Path], made: Mapping[str, Any]) -> dict[str, str]:
    """Line of parameters by name of the images that an earlier run with the same settings has finished."""
    record = folders[0] / PARAMETERS
    found: dict[str, str] = {}
    for line in record.read_text(encoding="utf-8").splitlines(keepends=True) if record.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break  # a line that was cut off by a kill
        if any(row.get(name) != value for name, value in made.items()):
            raise InputError(
                f"{record}: exists, of another recipe, seed or scale; choose an empty folder, or --overwrite"
            )
        if line.endswith("\n") and all((folder / row["file"]).is_file() for folder in folders):
            found[row["file"]] = line
    return found


def _degraded(
    path: Path, name: str, recipe: DegradationRecipe, made: Mapping[str, Any], device: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """The cropped HR and the LR image as uint8 (H, W, 3), and the line of parameters."""
    import torch

    from morsr.data.dataset import image_key
    from morsr.data.sources import crop_to_multiple
    from morsr.degradation import apply, degradation_measures, true_severity
    from morsr.evaluation.images import to_tensor, to_uint8
    from morsr.imaging import read_rgb

    hr, scale = crop_to_multiple(read_rgb(path), made["scale"]), made["scale"]
    parameters = recipe.sample(torch.tensor([image_key(name.removesuffix(".png"), made["seed"])]))
    lr = to_uint8(apply(to_tensor(hr).to(device), parameters, scale=scale))
    known: dict[str, Any] = {
        "severity": true_severity(parameters, recipe, scale=scale),
        "measures": degradation_measures(parameters, scale=scale),
    }
    numbers = {what: {key: round(v.item(), 5) for key, v in values._asdict().items()} for what, values in known.items()}
    return hr, lr, parameters.to_jsonl(extra=[{"file": name, "source": path.name, **made, **numbers}])
