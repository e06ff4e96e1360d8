"""The restorers of the restorer's own tests, for commands that load a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(next(path.parent for path in sorted(Path(__file__).parents[1].glob("*/restorer_twins.py")))))

import restorer_twins as twins

from morsr import Restorer


@pytest.fixture
def restorer() -> Restorer:
    """A restorer over a real generator with random weights and adapters."""
    return Restorer(twins.small_generator(), device="cpu")
