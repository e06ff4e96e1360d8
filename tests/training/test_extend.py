"""docs/extend.md: its classes are written to a file, named by its options, and trained with for a step."""

import re
from pathlib import Path

import pytest
from training_twins import run_options

from morsr.adapters import read_adapters_header
from morsr.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
CLASSES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OPTIONS = [line for block in re.findall(r"```\n(--.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text("\n\n".join(CLASSES[:-1]))
    return tmp_path


def options(folder: Path) -> list[str]:
    """A step of the shipped config on its own base."""
    return [
        *run_options("tiny/mor.yaml", "tiny", max_steps=1, default_root_dir=str(folder / "out")),
        "--model.adapters.targets=[sd_unet@unet, tiny_vae_encoder@vae]", "--data.batch_size=2",
    ]  # fmt: skip


def test_every_class_of_the_page_trains_and_restores(mine, capsys):
    assert len(OPTIONS) == 7
    assert main([*options(mine), *OPTIONS]) == 0
    (file,) = mine.rglob("adapters*.safetensors")
    held = {path.name for path in file.parent.iterdir()}
    assert {"config.yaml", "metrics.csv", "versions.json", "summary.json"} <= held
    header = read_adapters_header(file)
    assert header["condition_names"] == ["darkness", "contrast"]
    assert header["extra"]["estimator"]["kind"] == "mine.Darkness"
    assert header["extra"]["router"] == "mine.Worst"
    restore = ["upscale", "sample:chelsea", "out.png", f"--model={file}", "--estimator=mine.Darkness"]
    assert main(restore) == 2
    assert "--router mine.Worst" in capsys.readouterr().err
    assert main([*restore, "--router=mine.Head"]) == 2
    assert "subclass" in capsys.readouterr().err
    assert main([*restore, "--router=mine.Worst"]) == 0


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--model.estimator=mine.Absent", "Absent"),
        ("--model.losses.extra.edge=mine.Absent", "morsr"),
        ("--model.losses.gna.start=7", "morsr"),
        ("--model.optimizers={judge: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}}", "judge"),
    ],
)
def test_what_cannot_be_found_is_one_line(option, word, mine, capsys):
    assert main([*options(mine), option]) != 0
    last = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert word in last
    assert not list(mine.rglob("*.ckpt"))


def test_the_python_of_the_page_builds_a_module():
    scope: dict[str, object] = {}
    for block in CLASSES:
        exec(block, scope)
    module = scope["module"]
    assert list(module.objective.extra) == ["edge"]
    assert type(module.generator.adapters.router).__name__ == "Worst"
