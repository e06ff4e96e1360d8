"""The page of TensorBoard that a run is opened on."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

# Titles of charts to the tags that they show, as regular expressions. A chart without any tag stays empty.
PAGE = {
    "Losses": ["train/.*"],
    "PSNR": ["val/psnr"],
    "SSIM": ["val/ssim"],
    "NIQE": ["val/niqe"],
    "Load of the experts": [r"routing/load_entropy(_min)?", "routing/load_spread_min", r"routing/dead_share(_max)?"],
    "Active ranks and zero slots": ["routing/active_ranks", "routing/zero_share", "routing/zero_severity_spearman"],
    "Learning rates": ["lr[-/].*"],
    "Gradient norms by network": ["grad_norm/.*"],
    "Degradation scores: mean": ["degradation/.*"],
    "Degradation scores: deviation": ["degradation_deviation/.*"],
}


class TensorBoardPage(Callback):
    """Lays out one page under "Custom Scalars": losses, scores, load, learning rates and gradient norms by network.

    Sample pictures and heat maps stand under "Images", and every curve by itself under "Scalars", as ever.

    Args:
        charts: title to regular expressions of tags; None is `PAGE`.
    """

    def __init__(self, *, charts: dict[str, list[str]] | None = None) -> None:
        self.charts = PAGE if charts is None else charts

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layout = {"The run": {title: ["Multiline", list(tags)] for title, tags in self.charts.items()}}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(layout)
