"""Many files: read and written while the networks run, and a failed file stops nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from morsr.errors import InputError, MorsrError
from morsr.files import printable
from morsr.imaging import list_images, read, write
from morsr.imaging.files import file_format
from morsr.restoring.devices import is_out_of_memory

if TYPE_CHECKING:
    from morsr.imaging import Picture
    from morsr.restoring.restorer import Restorer
    from morsr.restoring.settings import Settings

AHEAD = 2  # files that are read before their turn, and files that may wait to be written


class Job(NamedTuple):
    """One file to restore."""

    source: Path
    target: Path


def folder_jobs(source: Path, target: Path, format: str | None = None) -> list[Job]:
    """Image files of a folder and its subfolders in natural order; outputs keep subfolder and stem.

    Args:
        source: folder of images.
        target: folder of the outputs; where it lies in the source, it is not searched.
        format: of the outputs ("png", "jpg", …); default that of each input.

    Raises:
        InputError: the target is a file, the same folder or a parent of it, or there is no image.
    """
    inside, outside = source.resolve(), target.resolve()
    if target.is_file():
        raise InputError(f"{target}: the input is a folder, so the output must be one too; this is a file")
    if inside == outside:
        raise InputError(f"{target}: the outputs would overwrite the inputs; choose another folder")
    found = list_images(source)
    if outside not in inside.parents:
        found = [path for path in found if outside not in path.resolve().parents]
    if not found:
        raise InputError(f"{source}: no image in this folder, but those in {target}")
    return [Job(path, target / path.relative_to(source).parent / output_name(path, format)) for path in found]


def output_name(source: Path, format: str | None = None) -> str:
    """The file name of an image's output: its own, or its stem with the suffix of the format."""
    return f"{source.stem}.{format.lower().lstrip('.')}" if format else source.name


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


def restore_files(restorer: Restorer, jobs: Sequence[Job], settings: Settings) -> Iterator[str | None]:
    """Restore files; outputs that exist are replaced.

    Yields:
        For each file in turn None, or one line that names it and says why it failed.

    Raises:
        ConfigError: settings that the model cannot follow.
    """
    settings.check_model(restorer.generator)

    def restored(job: Job, picture: Picture) -> Picture:
        return restorer.restore_for(job.target, picture, settings)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pictures = _ahead(reader, lambda job, _: read(job.source), ((job, None) for job in jobs))
        made = ((job, _attempt(restored, job, picture)) for job, picture in pictures)
        for job, error in _ahead(writer, lambda job, picture: write(picture, job.target), made):
            text, name = printable(str(error) or type(error).__name__), printable(str(job.source))
            yield None if error is None else text if name in text else f"{name}: {text}"


def _ahead(
    thread: ThreadPoolExecutor, work: Callable[[Job, Any], Any], found: Iterator[tuple[Job, Any]]
) -> Iterator[tuple[Job, Any]]:
    """Jobs with what a piece of work makes of their present state, in order; a thread works ahead meanwhile."""
    waiting: deque[tuple[Job, Future[Any]]] = deque()
    for job, state in found:
        waiting.append((job, thread.submit(_attempt, work, job, state)))
        if len(waiting) > AHEAD:
            job, future = waiting.popleft()
            yield job, future.result()
    for job, future in waiting:
        yield job, future.result()


def _attempt(work: Callable[[Job, Any], Any], job: Job, state: Any) -> Any:
    """What a piece of work gives, or its error, if that is one file's alone, such as damage or too little memory."""
    if isinstance(state, Exception):
        return state
    try:
        return work(job, state)
    except Exception as error:
        if isinstance(error, MorsrError) or is_out_of_memory(error):
            return error
        raise
