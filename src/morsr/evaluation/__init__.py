"""Benchmarks of models and of routing."""

from morsr.evaluation.callback import BenchmarkTable

__all__ = ["BenchmarkTable"]
