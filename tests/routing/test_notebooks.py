"""The notebooks run from top to bottom with the shipped model, and are stored with outputs of that model."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

SHORT: dict[str, dict[str, Any]] = {
    "1_inspect_routing": {"COPIES": 3},
    "2_switch_ranks": {"SIZE": 64, "STRENGTHS": [0.0, 1.0]},
    "3_own_photos": {
        "CONFIG": str(FOLDER.parent / "tiny/mor.yaml"),
        "STEPS": 2,
        "EXTRA": [
            "--data.batch_size=2",
            "--data.crop_size=64",
            "--data.num_workers=0",
            "--data.val_crop=64",
            "--model.calibration_images=16",
        ],
    },
}


@pytest.fixture(scope="module")
def render():
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("render_notebooks", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_outputs_of_the_shipped_model(path, render):
    """After a change of the shipped adapters: python experiments/notebooks/render.py"""
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["adapters"] == render.digest()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("data" in output for output in outputs) >= 2
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    assert path.stat().st_size < 600_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_imports_exist(path):
    source = "".join(line for cell in json.loads(path.read_text())["cells"] for line in [*cell["source"], "\n"])
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from morsr"))]
    assert imports
    exec("\n".join(imports), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, render, tmp_path):
    done = render.tidy(render.execute(render.load(path, SHORT[path.stem]), tmp_path, timeout=800))
    assert sum("data" in output for cell in done.cells for output in cell.get("outputs", [])) >= 2
