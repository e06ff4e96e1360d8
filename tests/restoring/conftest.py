"""Make the twins importable, and a restorer over the real small one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import restorer_twins as twins

from morsr.restoring import Restorer


@pytest.fixture
def restorer() -> Restorer:
    """A restorer over a real generator with random weights and adapters."""
    return Restorer(twins.small_generator(), device="cpu")
