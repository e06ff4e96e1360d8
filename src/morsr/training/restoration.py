"""A trained model as a LightningModule, for folders that are too large for one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from morsr.errors import MorsrError
from morsr.models.folder import restore_batch, start_sequence
from morsr.models.jobs import Job
from morsr.models.loading import load_generator
from morsr.models.picture import Picture
from morsr.models.restorer import Restorer
from morsr.models.settings import RoutingMode, Settings
from morsr.training.strategy import check_writer


class RestorationModule(L.LightningModule):
    """Restores the files of `morsr.data.files.ImageFiles`; `PredictionWriter` writes them.

    Args:
        model: shipped preset, adapters file, saved folder or checkpoint.
        base, decoder, prompt: as for `Restorer.from_pretrained`.
        dtype: "auto", "float32", "bfloat16" or "float16".
        scale, budget, generative, tile, color, color_strength, routing: as for a call of the restorer.

    Raises:
        ConfigError: a setting out of range, or one that cannot take effect.
        WeightsError: weights that are missing or damaged.
    """

    def __init__(
        self,
        *,
        model: str = "tiny",
        base: str | None = None,
        decoder: str | None = None,
        prompt: str | None = None,
        dtype: str = "auto",
        scale: float = 4.0,
        budget: int | None = None,
        generative: float = 1.0,
        tile: int | str | None = "auto",
        color: str = "wavelet",
        color_strength: float = 1.0,
        routing: RoutingMode = "image",
    ) -> None:
        super().__init__()
        self.settings = Settings(
            scale=scale, budget=budget, generative=generative, tile=tile, color=color,  # type: ignore[arg-type]
            color_strength=color_strength, routing=routing,
        )  # fmt: skip
        self.generator = load_generator(model, base=base, decoder=decoder, prompt=prompt)
        self.settings.check_model(self.generator)
        self.dtype_name = dtype
        self.restorer: Restorer | None = None
        self._sequence: Path | None = None

    def setup(self, stage: str) -> None:
        if stage == "predict":
            check_writer(self.trainer)

    def on_predict_start(self) -> None:
        self.restorer = Restorer(self.generator, device=self.device, dtype=self.dtype_name)

    def predict_step(
        self, batch: Sequence[tuple[Job, Picture | MorsrError]], batch_idx: int
    ) -> list[tuple[Job, Picture | MorsrError]]:
        """Each file with its restored picture, or with why there is none."""
        assert self.restorer is not None
        if self.settings.routing != "sequence":
            return list(restore_batch(self.restorer, batch, self.settings))
        done: list[tuple[Job, Picture | MorsrError]] = []
        for one in batch:
            self._begin_sequence(one[0].source.parent)
            done += restore_batch(self.restorer, [one], self.settings)
        return done

    def _begin_sequence(self, folder: Path) -> None:
        """Hold the routing of a folder's first frame, whichever device restores that one."""
        if folder == self._sequence:
            return
        assert self.restorer is not None
        self._sequence = folder
        first = getattr(self.trainer.datamodule, "first_of", {}).get(folder)  # type: ignore[attr-defined]
        start_sequence(self.restorer, first)
