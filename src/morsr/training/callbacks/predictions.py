"""Write what `morsr predict` restores: every file once, whole or not at all, and a stopped run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from morsr.errors import InputError, MorsrError
from morsr.models.folder import Outcome, failure
from morsr.models.jobs import Job, check_jobs, output_name
from morsr.models.picture import Picture
from morsr.models.picture_files import write_picture


class PredictionWriter(BasePredictionWriter):
    """Write each restored file below a folder, as soon as it is there.

    Files that fail stop nothing; they are told at the end, from all devices, by an InputError.

    Args:
        folder: where outputs go; they keep their place below their input folder.
        format: output format for all of them ("png", "jpg", …), else that of the input.
        overwrite: restore again what exists already.
    """

    def __init__(self, folder: str, *, format: str | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.format, self.overwrite = Path(folder).expanduser(), format, overwrite
        self.failed: list[str] = []
        self.written = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Every device looks before any of them writes: Lightning waits for all after the setup.
        if stage != "predict":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        outputs = self.folder.resolve()
        data.leave_out(lambda job: outputs in job.source.resolve().parents)
        check_jobs([Job(job.source, self._target(job)) for job in data.jobs], self.format)
        if not self.overwrite and (kept := data.leave_out(lambda job: self._target(job).exists())):
            rank_zero_info(f"{kept} outputs exist and are kept; overwrite: true restores them again")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[tuple[Job, Picture | MorsrError]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for job, result in prediction:
            try:
                if isinstance(result, MorsrError):
                    raise result
                write_picture(result, self._target(job), format=self.format)
                self.written += 1
            except MorsrError as error:
                self.failed.append(failure(Outcome(job, error)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say what was done on all devices; `on_predict_end` would not come to a device that got no file.

        Raises:
            InputError: some files could not be restored.
        """
        if stage != "predict":
            return
        parts: list[Any] = [(self.written, self.failed)]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self.written, self.failed))
        failed = sorted(line for _, lines in parts for line in lines)
        rank_zero_info(f"{sum(count for count, _ in parts)} images restored into {self.folder}")
        if failed:
            raise InputError(f"{len(failed)} files could not be restored:\n  " + "\n  ".join(failed))

    def _target(self, job: Job) -> Path:
        return self.folder / job.target.parent / output_name(job.target, self.format)
