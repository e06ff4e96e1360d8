"""`morsr upscale`: restore an image file, or a folder of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt

from morsr.commands._common import Dtype, existing, report_failures, say
from morsr.errors import ConfigError, InputError
from morsr.files import expanded, printable

SAMPLES = ("astronaut", "chelsea", "coffee")


def run(
    input: Path,
    output: str,
    *,
    model: str = "tiny",
    base: str | None = None,
    prompt: str | None = None,
    estimator: str | None = None,
    router: str | None = None,
    scale: float = 4.0,
    tile: PositiveInt | Literal["auto", "none"] = "auto",
    color: Literal["wavelet", "adain", "none"] = "wavelet",
    color_strength: ClosedUnitInterval = 1.0,
    strength: NonNegativeFloat = 1.0,
    device: str = "auto",
    dtype: Dtype = "auto",
    format: str | None = None,
    overwrite: bool = False,
) -> int:
    """Restore and enlarge an image, or every image in a folder and its subfolders.

    Outputs keep their stem, format, mode and metadata; existing outputs are skipped.

    Args:
        input: image file, folder, or sample:chelsea for a photograph that comes with morsr
        output: image file (its suffix decides the format) or folder
        model: shipped preset, adapters file, saved folder or checkpoint
        base: folder or hub id of the base model, if the adapters do not bring it, or class path of your own
        prompt: text instead of the model's own; the base must have its text encoder
        estimator: class path of an estimator of your own, or where CLIP's or the learned one's weights are
        router: class path of a router of your own
        scale: enlargement, 1 to 8
        tile: side of tiles in the networks' pixels
        color: colour correction
        color_strength: 0 to 1
        strength: factor on the routed ranks
        device: auto, cpu, cuda, cuda:1, mps, …
        dtype: precision
        format: of outputs in a folder, instead of that of each input: png, jpg, webp, tif, gif or bmp
        overwrite: restore again what exists already
    """
    from tqdm import tqdm

    from morsr.restoring import Restorer, Settings
    from morsr.restoring.folder import Job, check_jobs, jobs_into, processes, restore_files, wait_for_others

    settings = Settings(
        scale=scale, tile=None if tile == "none" else tile, color=color, color_strength=color_strength,
        strength=strength,
    )  # fmt: skip
    target = expanded(output)
    source = sample(str(input)) if str(input).startswith("sample:") else existing(input)
    if source.is_dir() or target.is_dir() or output.endswith("/") or not target.suffix:
        jobs = jobs_into(target, source, format)
    elif format:
        raise ConfigError(f"--format names outputs in a folder; {target} has its format in its name")
    else:
        jobs = [Job(source, target)]
    check_jobs(jobs)
    index, count = processes()
    jobs = jobs[index::count]
    waiting = [job for job in jobs if overwrite or not job.target.exists()]
    if skipped := len(jobs) - len(waiting):
        say(f"{skipped} of {len(jobs)} outputs exist and are kept, whatever made them; --overwrite restores them again")
    if not waiting:
        if source.is_dir():
            wait_for_others()
        return 0

    restorer = Restorer.from_pretrained(
        model, base=base, prompt=prompt, estimator=estimator, router=router, device=device, dtype=dtype
    )
    if source.is_file():
        with tqdm(unit="tile", desc=printable(source.name), leave=False, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)  # backwards too, when an image starts anew with smaller tiles

            restorer.restore_file(*waiting[0], progress=progress, **vars(settings))
        say(str(waiting[0].target))
        return 0
    lines = tqdm(restore_files(restorer, waiting, settings), total=len(waiting), unit="image", disable=None)
    failed = [line for line in lines if line]
    say(f"{len(waiting) - len(failed)} of {len(waiting)} images restored")
    wait_for_others()
    return report_failures(failed)


def sample(name: str) -> Path:
    """The file of a photograph that comes with scikit-image, by `sample:NAME`."""
    wanted = name.removeprefix("sample:")
    if wanted not in SAMPLES:
        raise InputError(f"{name}: no such sample; there are {', '.join(f'sample:{one}' for one in SAMPLES)}")
    return Path(str(resources.files("skimage.data"))) / f"{wanted}.png"
