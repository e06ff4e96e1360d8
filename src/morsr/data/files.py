"""Image files to restore, as `morsr predict` takes them: read by workers, every file once over all devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from morsr.errors import ConfigError, InputError, MorsrError
from morsr.models.jobs import Job, check_jobs, find_images, natural_order, unread_images
from morsr.models.picture_files import header_size, read_file


class ImageFiles(L.LightningDataModule):
    """Files of one or more folders. A batch is a list of (Job, Picture or what was wrong with the file).

    The job's target is relative; where outputs go is the writer's affair. Files are ordered by size, so that those of
    one batch can go through the networks together, and are dealt out to the devices in turn.

    Args:
        folders: searched with their subfolders; outputs keep their places below.
        batch_size: files that are read, and where their sizes agree restored, at once.
        num_workers: processes that read; 0 reads in the main process.
        by_size: order by size; otherwise by folder and name, as for frames of a film.

    Raises:
        ConfigError: no folder, or a number below its least.
    """

    def __init__(
        self, *, folders: Sequence[str], batch_size: int = 1, num_workers: int = 0, by_size: bool = True
    ) -> None:
        super().__init__()
        # A run that goes on may have fewer files left than devices.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if isinstance(folders, str) or not folders:
            raise ConfigError(f"folders: expected a list of folders, got {folders!r}")
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"expected batch_size from 1 and num_workers from 0, got {batch_size} and {num_workers}")
        self.folders, self.by_size = [Path(folder).expanduser() for folder in folders], by_size
        self.batch_size, self.num_workers = batch_size, num_workers
        self.jobs: list[Job] = []
        self.first_of: dict[Path, Path] = {}

    def setup(self, stage: str) -> None:
        """Find the files.

        Raises:
            InputError: a folder that is missing or has no image, or two files with one output.
        """
        found = []
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"{folder}: expected a folder of images, and there is none")
            found += [Job(path, path.relative_to(folder)) for path in find_images(folder)]
        if not found:
            raise InputError(f"no images in {', '.join(map(str, self.folders))}")
        check_jobs(found)
        self.jobs = sorted(found, key=natural_order)
        self.first_of = {job.source.parent: job.source for job in reversed(self.jobs)}
        if self.by_size:
            self.jobs.sort(key=lambda job: _size(job.source))

    def leave_out(self, done: Callable[[Job], bool]) -> int:
        """Drop the files that are done already, before the first batch; returns how many they were."""
        before = len(self.jobs)
        self.jobs = [job for job in self.jobs if not done(job)]
        return before - len(self.jobs)

    def predict_dataloader(self) -> DataLoader[Any]:
        files = _Files(self.jobs)
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(
            files,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=list,
            sampler=_Dealt(files, rank=rank, num_replicas=world) if world > 1 else None,
        )

    def teardown(self, stage: str) -> None:
        """Tell of images whose endings are not read; one process looks for them."""
        if self.trainer is not None and not self.trainer.is_global_zero:
            return
        for folder in self.folders:
            if left_out := unread_images(folder):
                rank_zero_warn(f"{folder}: {left_out}")

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """The restorer moves what it needs when it needs it."""
        return batch


class _Dealt(DistributedSampler[Any]):
    """Deals files out in turn, none twice; unlike Lightning's own, it may leave a device without any."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class _Files(Dataset[Any]):
    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[Job, Any]:
        try:
            return self.jobs[index], read_file(self.jobs[index].source)
        except MorsrError as error:
            return self.jobs[index], error


def _size(path: Path) -> tuple[int, int]:
    try:
        return header_size(path)
    except MorsrError:
        return 0, 0
