"""The notebooks run from top to bottom with the shipped model, and are stored without outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

SHORT: dict[str, dict[str, Any]] = {
    "1_inspect_routing": {"COPIES": 3},
    "2_switch_ranks": {"SIZE": 64, "SEEDS": 1, "STRENGTHS": [0.0, 1.0]},
    "3_own_photos": {
        "CONFIG": str(FOLDER.parent / "tiny/mor.yaml"),
        "STEPS": 2,
        "EXTRA": [
            "--data.init_args.batch_size=2",
            "--data.init_args.crop_size=64",
            "--data.init_args.num_workers=0",
            "--data.init_args.val_crop=64",
            "--data.init_args.test=[]",
            "--model.init_args.calibration_images=16",
        ],
    },
}


def shipped() -> bool:
    from morsr.errors import MorsrError
    from morsr.models.loading import find_adapters

    try:
        return find_adapters("tiny").is_file()
    except MorsrError:
        return False


@pytest.fixture(scope="module")
def render() -> Any:
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("render_notebooks", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path: Path):
    for cell in json.loads(path.read_text())["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_every_notebook_has_a_short_form():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHORT)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, render: Any, tmp_path: Path):
    if not shipped():
        pytest.skip("the shipped weights are not in this checkout")
    done = render.execute(render.load(path, SHORT[path.stem]), tmp_path, timeout=800)
    page = render.markdown(done, path.stem, tmp_path / "docs").read_text()
    assert page.count("![output]") >= 2
    assert len(list((tmp_path / "docs").glob("*.png"))) == page.count("![output]")


def test_an_unknown_parameter_is_named(render: Any):
    with pytest.raises(KeyError, match="has no parameter STEP"):
        render.load(FOLDER / "3_own_photos.ipynb", {"STEP": 3})
