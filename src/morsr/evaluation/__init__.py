"""Benchmarks of models and of routing."""
