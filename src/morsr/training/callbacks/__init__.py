"""What a run can be given: logs of the ranks, pictures, adapter files, averages, compiled steps, a summary."""

from __future__ import annotations

from morsr.training.callbacks.checkpoint import AdapterCheckpoint
from morsr.training.callbacks.compiled import CompiledTraining
from morsr.training.callbacks.ema import AdapterEMA
from morsr.training.callbacks.images import ImageGrid
from morsr.training.callbacks.layout import TensorBoardPage
from morsr.training.callbacks.plot import utilization_plot
from morsr.training.callbacks.progress import StepProgressBar
from morsr.training.callbacks.safety import RunSafety
from morsr.training.callbacks.summary import RunSummary
from morsr.training.callbacks.utilization import ExpertUtilization

__all__ = [
    "AdapterCheckpoint",
    "AdapterEMA",
    "CompiledTraining",
    "ExpertUtilization",
    "ImageGrid",
    "RunSafety",
    "RunSummary",
    "StepProgressBar",
    "TensorBoardPage",
    "utilization_plot",
]
