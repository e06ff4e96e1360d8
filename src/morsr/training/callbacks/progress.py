"""A progress bar for runs that count steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's bar without the "/-2" that it shows where a run has steps but no number of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs in (None, -1):
            return f"Epoch {current_epoch}, {self.trainer.max_steps} steps in all"
        return super()._get_train_description(current_epoch)
