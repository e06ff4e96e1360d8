"""What a run can be given: logs of the ranks, pictures, adapter files, averages, a closing message."""

from morsr.training.callbacks.adapters import AdapterCheckpoint as AdapterCheckpoint
from morsr.training.callbacks.adapters import AdapterEMA as AdapterEMA
from morsr.training.callbacks.images import ImageGrid as ImageGrid
from morsr.training.callbacks.stopping import FinalValidation as FinalValidation
from morsr.training.callbacks.stopping import RunSummary as RunSummary
from morsr.training.callbacks.stopping import StopBetweenSteps as StopBetweenSteps
from morsr.training.callbacks.utilization import ExpertUtilization as ExpertUtilization
