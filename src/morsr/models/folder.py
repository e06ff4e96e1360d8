"""Many files: equal sizes together, read and written beside the networks, and a failed file stops nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from morsr.errors import ConfigError, InputError, MorsrError
from morsr.models.jobs import Job, check_target, find_images, natural_order
from morsr.models.passes import tile_plan
from morsr.models.picture import Picture
from morsr.models.picture_files import form_for, header_size, read_file, write_picture
from morsr.models.streaming import is_streamed

if TYPE_CHECKING:
    from morsr.models.restorer import Restorer
    from morsr.models.settings import Settings

BATCH = 8
"""Most images of an automatic batch on an accelerator. A processor gains nothing from them, but from lanes."""

AHEAD = 2
"""Batches that are read before their turn, and batches that may wait to be written."""


class Outcome(NamedTuple):
    """What became of a file: `error` is None where it was restored."""

    job: Job
    error: MorsrError | None


class Batch(NamedTuple):
    """Files that go through the networks together.

    Attributes:
        jobs: the files.
        streamed: one that is read and written on its way.
        alone: needs all of the machine, such as one that is cut into tiles.
    """

    jobs: list[Job]
    streamed: bool = False
    alone: bool = False


def restore_files(
    restorer: Restorer,
    jobs: Sequence[Job],
    settings: Settings,
    *,
    format: str | None = None,
    batch: int | Literal["auto"] = "auto",
    frames: Sequence[Job] | None = None,
) -> Iterator[Outcome]:
    """Restore files, and say of each what became of it; outputs that exist are replaced.

    Files of equal size are taken together. With routing="sequence" every folder is one sequence in natural order
    (frame 2 before frame 10), and its first frame that can be read decides the routing of all.

    Args:
        restorer: the model.
        jobs: what to restore.
        settings: for all of them.
        format: output format, else what the targets' suffixes say.
        batch: images of equal size that go through the networks at once.
        frames: all files of the sequences, should some of them be restored already: a run that goes on where it was
            stopped still takes the routing of the same frame.

    Raises:
        ConfigError: a batch below 1.
    """
    lanes = _lanes(restorer, settings)
    beside: list[Batch] = []
    alone: list[Batch] = []
    for one in batches(restorer, jobs, settings, batch):
        (alone if one.alone or lanes == 1 else beside).append(one)
    if beside:
        yield from _in_lanes(restorer, beside, settings, format, lanes)
    yield from _one_by_one(restorer, alone, settings, format, sorted(frames or jobs, key=natural_order))


def _lanes(restorer: Restorer, settings: Settings) -> int:
    """Images that are restored at once, each by one thread of a processor."""
    if restorer.device.type != "cpu" or restorer.compiled or settings.routing == "sequence":
        return 1
    return torch.get_num_threads()


def _in_lanes(
    restorer: Restorer, taken: Sequence[Batch], settings: Settings, format: str | None, lanes: int
) -> Iterator[Outcome]:
    """Restore on a processor, an image or a batch to a thread and none waiting for another.

    Threads that share the layers of one small image wait for each other after each of them, and while a file is read
    or written all but one have nothing to do.
    """
    own = threading.local()

    def enter() -> None:
        torch.set_num_threads(1)  # of the layers that this thread runs
        own.restorer = restorer.twin()

    def run(one: Batch) -> list[Outcome]:
        results = restore_batch(own.restorer, list(zip(one.jobs, _read(one), strict=True)), settings, format)
        return [Outcome(job, _write(r, job, format) if isinstance(r, Picture) else r) for job, r in results]

    threads = torch.get_num_threads()
    waiting: deque[Future[list[Outcome]]] = deque()
    executor = ThreadPoolExecutor(lanes, initializer=enter)
    try:
        for one in taken:
            waiting.append(executor.submit(run, one))
            if len(waiting) > AHEAD * lanes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _one_by_one(
    restorer: Restorer, taken: Sequence[Batch], settings: Settings, format: str | None, frames: Sequence[Job]
) -> Iterator[Outcome]:
    """Restore one batch after the other, with files read and written beside the networks."""
    sequence = settings.routing == "sequence"
    sequences: dict[Path, list[Path]] = {}
    for frame in frames:
        sequences.setdefault(frame.source.parent, []).append(frame.source)
    held: Path | None = None
    waiting = iter(taken)
    with ThreadPoolExecutor(1, initializer=_give_way) as reader, ThreadPoolExecutor(1, initializer=_give_way) as writer:
        reading: deque[tuple[Batch, Future[list[Picture | MorsrError]]]] = deque()
        writing: deque[tuple[Job, Future[MorsrError | None]]] = deque()

        def read_next() -> None:
            if (following := next(waiting, None)) is not None:
                reading.append((following, reader.submit(_read, following)))

        for _ in range(AHEAD):
            read_next()
        while reading:
            one, pictures = reading.popleft()
            folder = one.jobs[0].source.parent
            if sequence and folder != held:
                start_sequence(restorer, sequences[folder][0], sequences[folder])
                held = folder
            if one.streamed:
                yield _streamed(restorer, one.jobs[0], settings, format)
            read = zip(one.jobs, pictures.result(), strict=False)  # of a streamed file nothing was read
            for job, result in restore_batch(restorer, list(read), settings, format):
                if isinstance(result, Picture):
                    writing.append((job, writer.submit(_write, result, job, format)))
                else:
                    yield Outcome(job, result)
            read_next()
            while len(writing) > AHEAD * len(one.jobs):
                job, written = writing.popleft()
                yield Outcome(job, written.result())
        for job, written in writing:
            yield Outcome(job, written.result())


def batches(
    restorer: Restorer, jobs: Sequence[Job], settings: Settings, batch: int | Literal["auto"] = "auto"
) -> list[Batch]:
    """Files of equal size in batches, the smallest first; frames of a sequence keep their order.

    Args:
        restorer, jobs, settings, batch: see `restore_files`.

    Raises:
        ConfigError: a batch below 1.
    """
    if batch != "auto" and batch < 1:
        raise ConfigError(f'batch: expected "auto" or a number from 1, got {batch}')
    sequence = settings.routing == "sequence"
    sized = [(_size(job), job) for job in sorted(jobs, key=natural_order)]
    if not sequence:
        sized.sort(key=lambda pair: pair[0])
    found: list[Batch] = []
    for (size, _), group in groupby(sized, key=lambda pair: (pair[0], pair[1].source.parent if sequence else None)):
        together = [job for _, job in group]
        height, width = (round(side * settings.scale) for side in size)
        if is_streamed((height, width)):
            found += [Batch([job], streamed=True, alone=True) for job in together]
            continue
        count, alone = _batch_size(restorer, (height, width), settings, batch)
        found += [Batch(together[start : start + count], alone=alone) for start in range(0, len(together), count)]
    return found


def _give_way() -> None:
    """Leave the cores to the networks: their threads wait for each other, so one without a core holds up all."""
    if sys.platform.startswith("linux"):  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def failure(outcome: Outcome) -> str:
    """One line that names the file that failed and says why."""
    text, source = str(outcome.error), str(outcome.job.source)
    return text if source in text else f"{source}: {text}"


def _size(job: Job) -> tuple[int, int]:
    """Height and width by the header; (0, 0) for what cannot be opened, which is told when its turn comes."""
    try:
        return header_size(job.source)
    except MorsrError:
        return 0, 0


def _batch_size(
    restorer: Restorer, size: tuple[int, int], settings: Settings, batch: int | Literal["auto"]
) -> tuple[int, bool]:
    """Images of a batch, and whether it needs all of the machine: for tiles, or for its memory."""
    if 0 in size:
        return 1, False
    plan = tile_plan(restorer.generator, size, settings.tile, restorer.device)
    if not plan.single or settings.routing == "tile":
        return 1, True
    lanes = _lanes(restorer, settings)
    fitting = plan.pixels_at_once // (plan.height * plan.width)
    wanted = (1 if restorer.device.type == "cpu" else BATCH) if batch == "auto" else batch
    count = max(1, min(wanted, fitting // lanes))
    return count, fitting < count * lanes


def _read(taken: Batch) -> list[Picture | MorsrError]:
    return [] if taken.streamed else [_read_one(job.source) for job in taken.jobs]


def _read_one(source: Path) -> Picture | MorsrError:
    try:
        return read_file(source)
    except MorsrError as error:
        return error


def _write(picture: Picture, job: Job, format: str | None) -> MorsrError | None:
    try:
        write_picture(picture, job.target, format=format)
    except MorsrError as error:
        return error
    return None


def start_sequence(restorer: Restorer, first: Path | None, frames: Sequence[Path] | None = None) -> None:
    """Hold the routing of the first frame of a sequence that can be read, whether it is restored already or not.

    Args:
        restorer: the model.
        first: the first frame; None leaves the routing to the next one that comes.
        frames: all of the sequence in their order; the images of the first one's folder by default.
    """
    restorer.reset_sequence()
    if first is None:
        return
    if frames is None:
        found = sorted((Job(path, path) for path in find_images(first.parent)), key=natural_order)
        frames = [job.source for job in found if job.source.parent == first.parent]
    for frame in frames:
        with contextlib.suppress(InputError):
            restorer.begin_sequence(frame)
            return


def restore_batch(
    restorer: Restorer,
    read: Sequence[tuple[Job, Picture | MorsrError]],
    settings: Settings,
    format: str | None = None,
) -> Iterator[tuple[Job, Picture | MorsrError]]:
    """Restore pictures that were read already, neighbours of equal size together; each comes out, or why it does not.

    Args:
        read: files with their pictures, or with what was wrong with them.
        restorer, settings, format: see `restore_files`.
    """
    good: list[tuple[Job, Picture]] = []
    for job, picture in read:
        problem = picture if isinstance(picture, MorsrError) else _refusal(job, picture, settings, format)
        if problem is not None:
            yield job, problem
        elif isinstance(picture, Picture):
            good.append((job, picture))
    for _, together in groupby(good, key=lambda pair: pair[1].size):
        yield from _together(restorer, list(together), settings)


def _streamed(restorer: Restorer, job: Job, settings: Settings, format: str | None) -> Outcome:
    try:
        restorer.restore_file(*job, format=format, **asdict(settings))
    except MorsrError as error:
        return Outcome(job, error)
    return Outcome(job, None)


def _refusal(job: Job, picture: Picture, settings: Settings, format: str | None) -> MorsrError | None:
    """Why a picture could not be written, found before the work is done."""
    try:
        check_target(*job)
        form_for(picture, job.target, settings.size(picture), format)
    except MorsrError as error:
        return error
    return None


def _together(
    restorer: Restorer, good: list[tuple[Job, Picture]], settings: Settings
) -> Iterator[tuple[Job, Picture | MorsrError]]:
    jobs, pictures = [job for job, _ in good], [picture for _, picture in good]
    try:
        yield from zip(jobs, restorer.restore_pictures(pictures, settings), strict=True)
    except MorsrError as error:
        if len(good) == 1:
            yield jobs[0], error
        else:  # one picture of the batch is the cause, and only that one is to fail
            for one in good:
                yield from _together(restorer, [one], settings)
