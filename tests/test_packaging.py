"""The wheel carries weights and configs and restores a picture far from the checkout; all asked for is pinned."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, repo_root, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_source_weights_and_configs(wheel, repo_root):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    package = repo_root / "src" / "morsr"
    source = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts  # another test may be writing there
    }
    configs = {f"morsr/{p.relative_to(repo_root)}" for p in (repo_root / "experiments").rglob("*.yaml")}
    assert source <= held
    assert configs
    assert configs <= held
    assert "morsr/py.typed" in held
    assert any(re.fullmatch(r"morsr/weights/.+\.safetensors", name) for name in held)
    strangers = {name for name in held if not re.match(r"morsr/|morsr-[^/]+\.dist-info/", name)}
    assert not strangers
    assert not {name for name in held if name.endswith((".ipynb", ".ckpt", ".pyc")) or "/tests/" in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert wheel.stat().st_size <= 24e6


def test_the_source_runs_on_the_oldest_python(repo_root):
    vermin = Path(sys.executable).with_name("vermin")
    options = ("--target=3.10-", "--eval-annotations", "--no-tips", "--quiet")
    run(vermin, *options, "src", "experiments", "benchmarks", cwd=repo_root)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_alone_in_a_clean_environment_upscales(wheel, tmp_path, repo_root):
    """Installed with its core dependencies only, in a fresh environment: nothing else may be needed."""
    pytest.importorskip("uv")
    venv, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    # without what could lead back to the checkout
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    uv = [sys.executable, "-m", "uv"]
    pins = ["-c", repo_root / "constraints.txt"] if sys.version_info >= (3, 11) else []
    run(*uv, "venv", "--python", sys.executable, venv, cwd=away, env=clean)
    run(*uv, "pip", "install", "--python", venv, *pins, wheel, cwd=away, env=clean, timeout=900)
    run(venv / "bin" / "morsr", "upscale", "sample:chelsea", "out.png", cwd=away, env=clean)
    with Image.open(away / "out.png") as picture:
        assert picture.size == (1804, 1200)


def test_constraints_are_plain_pins_of_everything_asked_for(repo_root):
    pyproject = pytest.importorskip("tomllib").loads((repo_root / "pyproject.toml").read_text())
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([A-Za-z0-9.]+)", line).groups() for line in lines)
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(entry for name, group in extras.items() if name != "all" for entry in group)]
    names = {re.match(r"[A-Za-z0-9-]+", entry).group().lower() for entry in asked} - {"morsr"}
    assert not names - set(pins)
    dropped = {entry.partition(" ")[0] for entry in pyproject["tool"]["uv"]["override-dependencies"]}
    assert not dropped & set(pins)
