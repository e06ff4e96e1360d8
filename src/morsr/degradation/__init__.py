"""Real-world degradations, made on the device, one full set of parameters per image.

Read in this order: recipe.py (distributions), parameters.py (what was drawn), pipeline.py (applying it),
severity.py (how bad it is), reference.py (the same chain on basicsr's operators).
"""

from morsr.degradation.keys import sample_keys
from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.pipeline import apply, degrade
from morsr.degradation.recipe import DegradationRecipe, preset_names
from morsr.degradation.severity import DegradationMeasures, DegradationSeverity, degradation_measures, true_severity

__all__ = [
    "DegradationMeasures",
    "DegradationParameters",
    "DegradationRecipe",
    "DegradationSeverity",
    "apply",
    "degradation_measures",
    "degrade",
    "preset_names",
    "sample_keys",
    "true_severity",
]
