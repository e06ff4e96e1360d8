"""The wheel carries weights and configs and restores a picture far from the checkout; all asked for is pinned."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what could lead back to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | more


@pytest.fixture(scope="module")
def pyproject(repo_root):
    return tomllib.loads((repo_root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, repo_root, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def photo(tmp_path):
    rows, columns = np.mgrid[0:20, 0:24]
    pixels = np.stack([rows * 10, columns * 8, rows * columns % 255], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def check_restored(path: Path) -> None:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (96, 80))
        assert np.asarray(picture).std() > 5


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


def test_wheel_metadata(wheel, pyproject):
    archive = zipfile.ZipFile(wheel)
    (name,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    from morsr import __version__

    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == "<3.13,>=3.10"
    core = [entry for entry in metadata.get_all("Requires-Dist") if "extra ==" not in entry]
    assert len(core) == len(pyproject["project"]["dependencies"])
    assert not [entry for entry in core if entry.startswith(("basicsr", "pyiqa", "peft", "onnx"))]
    scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "morsr = morsr.cli:main" in scripts


@pytest.mark.slow
def test_unpacked_wheel_upscales_away_from_the_checkout(wheel, photo, tmp_path):
    site, away = tmp_path / "site", tmp_path / "away"
    zipfile.ZipFile(wheel).extractall(site)
    away.mkdir()
    program = "import morsr.cli as cli; print(cli.__file__); raise SystemExit(cli.main())"
    environment = clean_environment(PYTHONPATH=str(site))
    said = run(sys.executable, "-c", program, "upscale", photo, away / "out.png", cwd=away, env=environment)
    assert said.startswith(str(site))
    check_restored(away / "out.png")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_alone_in_a_clean_environment_upscales(wheel, photo, tmp_path, repo_root):
    """Installed with its core dependencies only, in a fresh environment: nothing else may be needed."""
    pytest.importorskip("uv")
    venv, away, environment = tmp_path / "venv", tmp_path / "away", clean_environment()
    away.mkdir()
    uv = [sys.executable, "-m", "uv"]
    pins = ["-c", repo_root / "constraints.txt"] if sys.version_info >= (3, 11) else []
    run(*uv, "venv", "--python", sys.executable, venv, cwd=away, env=environment)
    run(*uv, "pip", "install", "--python", venv, *pins, wheel, cwd=away, env=environment, timeout=900)
    run(venv / "bin" / "morsr", "upscale", photo, "out.png", cwd=away, env=environment)
    check_restored(away / "out.png")


def test_constraints_are_plain_pins_of_everything_asked_for(repo_root, pyproject):
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([A-Za-z0-9.]+)", line).groups() for line in lines)
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(entry for name, group in extras.items() if name != "all" for entry in group)]
    names = {re.match(r"[A-Za-z0-9-]+", entry).group().lower() for entry in asked} - {"morsr"}
    assert not names - set(pins)
    dropped = {entry.partition(" ")[0] for entry in pyproject["tool"]["uv"]["override-dependencies"]}
    assert not dropped & set(pins)


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_ranges_admit_the_oldest_supported_torch(package, pyproject):
    from packaging.requirements import Requirement

    (found,) = (Requirement(e) for e in pyproject["project"]["dependencies"] if Requirement(e).name == package)
    assert {"torch": "2.11.0", "torchvision": "0.26.0"}[package] in found.specifier
