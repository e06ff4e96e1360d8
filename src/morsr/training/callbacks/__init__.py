"""What a run can be given: logs of the ranks, pictures, adapter files, averages, a closing message."""

from __future__ import annotations

from morsr.training.callbacks.adapters import AdapterCheckpoint, AdapterEMA
from morsr.training.callbacks.images import ImageGrid
from morsr.training.callbacks.stopping import FinalValidation, RunSummary, StopBetweenSteps
from morsr.training.callbacks.utilization import ExpertUtilization

__all__ = [
    "AdapterCheckpoint",
    "AdapterEMA",
    "ExpertUtilization",
    "FinalValidation",
    "ImageGrid",
    "RunSummary",
    "StopBetweenSteps",
]
