"""Says at the end of a run where everything went and what it reached."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from morsr.files import write_text
from morsr.training.callbacks.checkpoint import AdapterCheckpoint
from morsr.training.callbacks.common import routing_context, run_folder
from morsr.training.callbacks.images import ImageGrid
from morsr.training.callbacks.plot import utilization_plot
from morsr.training.callbacks.utilization import ExpertUtilization

C = TypeVar("C", bound=Callback)


class RunSummary(Callback):
    """Prints, when `fit` ends, where checkpoint, adapters, TensorBoard folder, pictures and plots are, and a table.

    It reads the other callbacks of the trainer and leaves out what a run has not made. The plot of expert
    utilization is drawn here, and the same facts go to `summary.json` in the run's folder.

    Args:
        metrics: which validation values the table shows, by prefix.
    """

    def __init__(self, *, metrics: str = "val/") -> None:
        self.metrics = metrics
        self.files: dict[str, str] = {}
        self._validations: list[dict[str, float]] = []
        self._start = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()
        self._validations = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        values = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(self.metrics)
        }
        self._validations.append({"step": trainer.global_step, **values})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.files = _written(trainer, pl_module, folder)
        seconds = time.perf_counter() - self._start
        facts: dict[str, Any] = {
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            "files": self.files,
            "validation": self._validations,
        }
        text = json.dumps(facts, indent=2)
        write_text(folder / "summary.json", text + "\n")
        rank_zero_info(describe(trainer.global_step, seconds, self.files, self._validations, prefix=self.metrics))


def describe(
    steps: int, seconds: float, files: dict[str, str], validations: list[dict[str, float]], *, prefix: str = "val/"
) -> str:
    """The text that a run ends with: one line per file, and the first and the last validation side by side."""
    minutes, rest = divmod(round(seconds), 60)
    took = f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    width = max((len(name) for name in files), default=0)
    lines = ["", f"Finished: {steps} steps in {took}", ""]
    lines += [f"  {name:<{width}}  {path}" for name, path in files.items()]
    if validations:
        lines += ["", *_table(validations, prefix)]
    adapters = files.get("adapters, best") or files.get("adapters")
    if adapters:
        lines += ["", f"  restore a photo with it:  morsr upscale photo.jpg out.png --model {adapters}"]
    if "TensorBoard" in files:
        lines += [f"  look at the curves:       tensorboard --logdir {files['TensorBoard']}"]
    if "routing table" in files:
        lines.append(f"  see the experts:          morsr routing {files['routing table']} --out report.html")
    return "\n".join([*lines, ""])


def _table(validations: list[dict[str, float]], prefix: str) -> list[str]:
    first, last = validations[0], validations[-1]
    names = [name for name in last if name.startswith(prefix)]
    width = max(10, *(len(name) - len(prefix) for name in names)) if names else 10
    heads, several = [f"step {last['step']:.0f}"], len(validations) > 1
    if several:
        heads = [f"step {first['step']:.0f}", *heads, "change"]
    lines = [f"  {'validation':<{width}}" + "".join(f"{head:>13}" for head in heads)]
    for name in names:
        row = f"{last[name]:>13.4f}"
        if several:
            before = first.get(name, float("nan"))
            row = f"{before:>13.4f}{row}{last[name] - before:>+13.4f}"
        lines.append(f"  {name[len(prefix) :]:<{width}}{row}")
    return lines


def _written(trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> dict[str, str]:
    files: dict[str, str | Path | None] = {"run folder": folder}
    if checkpoint := _find(trainer, ModelCheckpoint):
        files["checkpoint"] = checkpoint.last_model_path or checkpoint.best_model_path
    if adapters := _find(trainer, AdapterCheckpoint):
        files |= {"adapters": adapters.last_path, "adapters, best": adapters.best_path}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            files["TensorBoard"] = logger.log_dir
        elif isinstance(logger, CSVLogger):
            files["metrics table"] = Path(logger.log_dir) / "metrics.csv"
    if grid := _find(trainer, ImageGrid):
        files["before and after"] = grid.latest
    tables = sorted((folder / "routing").glob("*.safetensors"))
    if tables:
        files["routing table"] = tables[-1]
    usage = _find(trainer, ExpertUtilization)
    context = routing_context(pl_module)
    if usage and usage.latest and context is not None:
        files["use of the ranks"] = utilization_plot(
            usage.latest.load,
            (usage.severity, usage.zero_share),
            folder / "expert_utilization.png",
            num_zero=context.config.num_zero,
            num_shared=context.config.num_shared,
            top_k=context.config.top_k,
            expert_rank=context.config.expert_rank,
            layer_names=usage.layer_names,
            title=f"How the ranks are used, last {usage.latest.images} images of {trainer.global_step} steps",
        )
    return {name: str(path) for name, path in files.items() if path and Path(path).exists()}


def _find(trainer: L.Trainer, kind: type[C]) -> C | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]
