"""Real-world degradations, made on the device, one full set of parameters per image.

Read recipe.py (distributions), parameters.py (what was drawn), pipeline.py (applying it), severity.py (how bad it is).
"""

from morsr.degradation.keys import sample_keys
from morsr.degradation.measures import DegradationMeasures, degradation_measures
from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.pipeline import apply, degrade
from morsr.degradation.recipe import DegradationRecipe, preset_names
from morsr.degradation.severity import true_severity

__all__ = [
    "DegradationMeasures",
    "DegradationParameters",
    "DegradationRecipe",
    "apply",
    "degradation_measures",
    "degrade",
    "preset_names",
    "sample_keys",
    "true_severity",
]
