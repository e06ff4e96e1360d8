"""Many files: read and written while the networks run, equal sizes together, and a failed file stops nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from morsr.errors import ConfigError, InputError, MorsrError
from morsr.files import printable
from morsr.imaging import image_size, list_images, read, write
from morsr.imaging.files import check_output, file_format
from morsr.restoring.devices import is_out_of_memory
from morsr.restoring.restorer import is_streamed

if TYPE_CHECKING:
    from morsr.imaging import Picture
    from morsr.restoring.restorer import Restorer
    from morsr.restoring.settings import Settings

BATCH = 8  # most images of an automatic batch
AHEAD = 2  # batches that are read before their turn, and batches that may wait to be written


class Job(NamedTuple):
    """One file to restore."""

    source: Path
    target: Path


class Outcome(NamedTuple):
    """What became of a file: `error` is None where it was restored."""

    job: Job
    error: Exception | None

    def __str__(self) -> str:
        """One line that names the file and says why it failed."""
        text, name = printable(str(self.error) or type(self.error).__name__), printable(str(self.job.source))
        return text if name in text else f"{name}: {text}"


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


def check_jobs(jobs: Sequence[Job], format: str | None = None) -> None:
    """Check all outputs before the first is made.

    Raises:
        InputError: two inputs with one output, an output that is an input, or a format that cannot be written.
    """
    seen: dict[Path, Path] = {}
    inputs = {source.resolve() for source, _ in jobs}
    for source, target in jobs:
        file_format(target, format)
        place = target.resolve()
        if place in inputs:
            raise InputError(f"{target}: this output would overwrite an input")
        if place in seen:
            remedy = "rename one, or leave out the format" if format else "rename one"
            raise InputError(f"{seen[place]} and {source} would both become {target}; {remedy}")
        seen[place] = source


def processes() -> tuple[int, int]:
    """This process's index and the number of processes that torchrun or srun started for this command; else (0, 1)."""
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if index in os.environ and count in os.environ:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


def restore_files(
    restorer: Restorer,
    jobs: Sequence[Job],
    settings: Settings,
    *,
    format: str | None = None,
    batch: int | Literal["auto"] = "auto",
) -> Iterator[Outcome]:
    """Restore files, and say of each what became of it; outputs that exist are replaced.

    Args:
        restorer: the model.
        jobs: what to restore.
        settings: for all of them.
        format: output format; default what the targets' suffixes say.
        batch: images of equal size that go through the networks at once; "auto" is 1 on a processor, which gains
            nothing from more, and up to 8 on an accelerator.

    Raises:
        ConfigError: a batch below 1, or settings that the model cannot follow.
    """
    settings.check_model(restorer.generator)
    groups = batches(restorer, jobs, settings, batch)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: deque[tuple[Job, Future[Any]]] = deque()
        for together, pictures in _read_ahead(reader, groups, settings, format):
            for job, result in _restored(restorer, together, [one.result() for one in pictures], settings, format):
                if result is None or isinstance(result, Exception):
                    yield Outcome(job, result)
                else:
                    writing.append((job, writer.submit(_attempt, write, result, job.target, format=format)))
            while len(writing) > AHEAD * len(together):
                job, written = writing.popleft()
                yield Outcome(job, written.result())
        for job, written in writing:
            yield Outcome(job, written.result())


def batches(
    restorer: Restorer, jobs: Sequence[Job], settings: Settings, batch: int | Literal["auto"] = "auto"
) -> list[list[Job]]:
    """Files of equal size in batches, the smallest first; one by one in the given order where that gains nothing.

    Raises:
        ConfigError: a batch below 1.
    """
    if batch != "auto" and batch < 1:
        raise ConfigError(f'batch: expected "auto" or a number from 1, got {batch}')
    if batch == 1 or (batch == "auto" and restorer.device.type == "cpu"):
        return [[job] for job in jobs]
    found: list[list[Job]] = []
    # What cannot be opened has no size, and is said when its turn comes.
    found_sizes = {job: _attempt(image_size, job.source) for job in jobs}
    sizes = {job: (0, 0) if isinstance(size, Exception) else size for job, size in found_sizes.items()}
    for size, group in groupby(sorted(jobs, key=sizes.__getitem__), key=sizes.__getitem__):
        together, count = list(group), 1
        if size != (0, 0):
            fitting = restorer.passes.images_at_once(settings.output_size(*size), settings)
            count = min(fitting, BATCH) if batch == "auto" else batch
        found += [together[start : start + count] for start in range(0, len(together), count)]
    return found


def _attempt(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a piece of work gives, or its error, if that is one file's alone, such as damage or too little memory."""
    try:
        return work(*arguments, **options)
    except Exception as error:
        if isinstance(error, MorsrError) or is_out_of_memory(error):
            return error
        raise


def _read_ahead(
    reader: ThreadPoolExecutor, groups: Sequence[list[Job]], settings: Settings, format: str | None
) -> Iterator[tuple[list[Job], list[Future[Any]]]]:
    """Groups of files with their pictures to come; the next ones are read while one is worked on."""
    reading: deque[tuple[list[Job], list[Future[Any]]]] = deque()
    for group in groups:
        reading.append((group, [reader.submit(_attempt, _read, job, settings, format) for job in group]))
        if len(reading) == AHEAD:
            yield reading.popleft()
    yield from reading


def _read(job: Job, settings: Settings, format: str | None) -> Picture | None:
    """A file's picture, or None where it is too large to be held and is read at its turn."""
    if is_streamed(settings.output_size(*image_size(job.source))):
        return None
    picture = read(job.source)
    # What cannot be written is refused before the work is done.
    check_output(picture, job.target, settings.output_size(*picture.size), format)
    return picture


def _restored(
    restorer: Restorer, jobs: Sequence[Job], read: Sequence[Any], settings: Settings, format: str | None
) -> list[tuple[Job, Picture | Exception | None]]:
    """Each job with its restored picture, why there is none, or None where it is written already."""
    done: list[tuple[Job, Any]] = []
    good: list[tuple[Job, Picture]] = []
    for job, picture in zip(jobs, read, strict=True):
        if picture is None:
            done.append((job, _attempt(restorer.restore_file, *job, format=format, **vars(settings))))
        elif isinstance(picture, Exception):
            done.append((job, picture))
        else:
            good.append((job, picture))
    if not good:
        return done
    results = _attempt(restorer.restore_pictures, [picture for _, picture in good], settings)
    if not isinstance(results, Exception):
        return done + list(zip([job for job, _ in good], results[0], strict=True))
    if len(good) == 1:
        return [*done, (good[0][0], results)]
    for job, picture in good:  # one picture of the batch is the cause, and only that one is to fail
        done += _restored(restorer, [job], [picture], settings, format)
    return done
