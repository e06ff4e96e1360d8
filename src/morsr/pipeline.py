"""MoRPipeline under the name that users of diffusers look for: `from morsr.pipeline import MoRPipeline`."""

from __future__ import annotations

from morsr.models.pipeline import MoRPipeline

__all__ = ["MoRPipeline"]
