"""Many files: some are read and written while the networks run, and a failed one stops nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from morsr.errors import InputError, MorsrError
from morsr.files import printable
from morsr.imaging import list_images
from morsr.imaging.files import file_format
from morsr.restoring.devices import is_out_of_memory

if TYPE_CHECKING:
    from morsr.restoring.restorer import Restorer
    from morsr.restoring.settings import Settings

AT_ONCE = 3  # files in work


class Job(NamedTuple):
    """One file to restore."""

    source: Path
    target: Path


def jobs_into(folder: Path, source: Path, format: str | None = None) -> list[Job]:
    """One image file, or those of a folder and its subfolders in natural order, with their outputs in a folder.

    Args:
        folder: of the outputs, which keep subfolder and stem; where it lies in the source, it is not searched.
        source: image file or folder of images.
        format: of the outputs ("png", "jpg", …); default that of each input.

    Raises:
        InputError: the folder is a file or the source, or there is no image.
    """
    inside, outside = source.resolve(), folder.resolve()
    if folder.is_file():
        raise InputError(f"{folder}: the output must be a folder; this is a file")
    if inside == outside:
        raise InputError(f"{folder}: the outputs would overwrite the inputs; choose another folder")
    found, root = list_images(source), source if source.is_dir() else source.parent
    if source.is_dir() and outside not in inside.parents:
        found = [path for path in found if outside not in (path.parent.resolve() / path.name).parents]
    if not found:
        raise InputError(f"{source}: no image in this folder, but those in {folder}")
    targets = [folder / path.relative_to(root) for path in found]
    if format:
        file_format(f"out.{format.lower().lstrip('.')}")
        targets = [target.with_name(f"{target.stem}.{format.lower().lstrip('.')}") for target in targets]
    return list(map(Job, found, targets))


def check_jobs(jobs: Sequence[Job]) -> None:
    """Check all outputs before the first is made.

    Raises:
        InputError: two inputs with one output, an output that is an input, or a format that cannot be written.
    """
    seen: dict[Path, Path] = {}
    inputs = {source.resolve() for source, _ in jobs}
    for source, target in jobs:
        file_format(target)
        place = target.resolve()
        if place in inputs:
            raise InputError(f"{target}: this output would overwrite an input")
        if place in seen:
            raise InputError(f"{seen[place]} and {source} would both become {target}; rename one")
        seen[place] = source


def processes() -> tuple[int, int]:
    """This process's index and the number of processes that torchrun or srun started for this command; else (0, 1)."""
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if index in os.environ and count in os.environ:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


def wait_for_others() -> None:
    """Under torchrun, wait until all processes are here: it ends them all once one has failed on some file."""
    if "TORCHELASTIC_RUN_ID" in os.environ and processes()[1] > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()
        dist.destroy_process_group()


def restore_files(restorer: Restorer, jobs: Sequence[Job], settings: Settings) -> Iterator[str | None]:
    """Restore files; outputs that exist are replaced.

    Yields:
        For each file in turn None, or one line that names it and says why it failed.

    Raises:
        ConfigError: settings that the model cannot follow.
    """
    settings.check_model(restorer.generator)
    stopped = threading.Event()

    def go_on(done: int, total: int) -> None:
        if stopped.is_set():
            raise MorsrError("stopped")

    def failure(job: Job) -> str | None:
        try:
            restorer.restore_file(*job, progress=go_on, **vars(settings))
        except Exception as error:
            if not isinstance(error, MorsrError) and not is_out_of_memory(error):
                raise  # of ours, not of this file
            text, name = printable(str(error) or type(error).__name__), printable(str(job.source))
            return text if name in text else f"{name}: {text}"
        return None

    if restorer.device.type == "cpu":  # the networks take all cores, and another thread would allocate anew
        yield from map(failure, jobs)
        return
    # The networks run for one thread at a time; meanwhile the others read, correct colours and write.
    with ThreadPoolExecutor(AT_ONCE) as threads:
        try:
            yield from threads.map(failure, jobs)
        finally:
            stopped.set()  # by Ctrl-C: the files in work end with their present tile
