"""`import morsr` costs next to nothing, and every public name is there when asked for."""

import json
import subprocess
import sys

import pytest

import morsr

HEAVY = ("torch", "lightning", "pytorch_lightning", "diffusers", "transformers", "numpy", "cv2", "matplotlib")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("module", ["morsr", "morsr.errors"])
def test_import_loads_nothing_heavy(module):
    loaded = json.loads(run_python(f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert module in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_takes_at_most_0_3_seconds():
    """Measured in processor time of the import alone, best of three, so that a busy machine does not fail it."""
    code = "import time; start = time.process_time(); import morsr; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(3)) <= 0.3


@pytest.mark.parametrize("name", morsr.__all__)
def test_public_name_resolves(name):
    value = getattr(morsr, name)
    assert isinstance(value, str) if name == "__version__" else callable(value)
    if name != "__version__":
        assert value.__name__ == name
