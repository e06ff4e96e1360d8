"""What the notebooks read: configs that extend others, and photographs of the usual endings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


def cell(repo_root: Path, name: str, holds: str) -> str:
    """The source of the code cell with this text."""
    cells = json.loads((repo_root / "experiments" / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    return next(text for text in ("".join(part["source"]) for part in cells) if holds in text)


def test_own_photos_take_a_config_that_extends_another(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    Path("above.yaml").write_text(
        "{data: {init_args: {scale: 4}}, trainer: {logger: {init_args: {name: n}}}, model: {init_args: {k: 1}}}"
    )
    Path("below.yaml").write_text("{extends: above.yaml, model: {init_args: {k: 2}}}")
    known: dict[str, Any] = {"PHOTOS": None, "CONFIG": "below.yaml", "STEPS": 3, "OUT": "runs"}
    for holds in ("from morsr.cli import main", "own_photos.yaml"):
        exec(cell(repo_root, "3_own_photos.ipynb", holds), known)
    made = yaml.safe_load(Path("own_photos.yaml").read_text())
    assert made["data"]["init_args"] == {"scale": 4, "train": ["skimage:train"]}
    assert made["model"]["init_args"] == {"k": 2}


def test_inspected_photos_are_of_all_usual_endings(repo_root: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.JPEG", "d.webp", "e.txt"):
        (tmp_path / name).touch()
    known: dict[str, Any] = {"PHOTOS": tmp_path, "Path": Path}
    exec(cell(repo_root, "1_inspect_routing.ipynb", "PHOTOS is None").partition("\nrecipe =")[0], known)
    assert sorted(known["photos"]) == ["a", "b", "c", "d"]
