"""Degradation estimators: image to named scores in [0, 1], higher is worse."""

from __future__ import annotations

from morsr.estimators.base import DegradationEstimator, DegradationScores, build_estimator

__all__ = ["DegradationEstimator", "DegradationScores", "build_estimator"]
