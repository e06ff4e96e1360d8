"""`morsr ablation`: every row has a folder of its own, and no finished training is lost."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from morsr.commands import ablation as command
from morsr.errors import ConfigError

FAKE = """#!{python}
import pathlib, sys
options = dict(a.split("=", 1) for a in sys.argv[3:] if "=" in a)
base = "--trainer.logger.init_args."
folder = pathlib.Path(options[base + "save_dir"]) / options[base + "name"] / options[base + "version"]
with open({calls!r}, "a") as stream:
    stream.write(folder.name + "\\n")
(folder / "scores").mkdir(parents=True)
(folder / "scores" / "step_000005.csv").write_text("image,method,psnr\\na,bicubic,19\\na,morsr,20\\n")
(folder / "config.yaml").write_text("model: {{init_args: {{adapters: {{num_ranks: 10}}}}}}")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The list of trainings that ran; the working directory holds a.yaml and b.yaml."""
    script, found = tmp_path / "fake", tmp_path / "calls.txt"
    script.write_text(FAKE.format(python=sys.executable, calls=str(found)))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("{}")
    found.touch()
    return found


def run(*arguments: str) -> int:
    parser = ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments, "--seeds", "0"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["α=a.yaml", "β=b.yaml"], "'α' and 'β' would share the folder _"),
        (["MoR (1)=a.yaml", "MoR [1]=b.yaml"], "would share the folder MoR_1_"),
        (["..=a.yaml"], "a name that can be a folder's, got '..'"),
        ([".=a.yaml"], "a name that can be a folder's, got '.'"),
        (["a.yaml", "--sweep", "k=1,1"], "different names, got 'a, k=1' twice"),
        (["a.yaml", "--sweep", "k=1", "--sweep", "k=2"], "every key once"),
        (["a.yaml", "--sweep", "k=[1,2"], "brackets close"),
        (["a.yaml", "--sweep", "k=1],[2"], "brackets close"),
        (["a.yaml", "--jobs", "-1"], "--jobs: expected 1 or more"),
    ],
)
def test_rows_without_a_folder_of_their_own_are_refused(calls: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(*arguments)
    assert message in str(error.value)
    assert not calls.read_text()


def test_sweeps_part_at_commas_outside_brackets() -> None:
    (a, b, *more) = command.expand([command.Row("r", Path("r.yaml"))], ["data.train=[x,{k: 1,l: 2}],none"], [])
    assert not more
    assert (a.overrides, b.overrides) == (("--data.train=[x,{k: 1,l: 2}]",), ("--data.train=none",))


def test_swept_keys_with_one_last_part_are_told_apart() -> None:
    (row,) = command.expand([command.Row("r", Path("r.yaml"))], ["data.seed=1", "model.seed=2"], [])
    assert row.name == "r, data.seed=1, model.seed=2"


def test_paths_may_hold_equals_signs(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    (tmp_path / "x=y" / "a.yaml").write_text("{}")
    rows = command.parse_rows(["x=y/a.yaml", "n=x=y/a.yaml", "lr=3=b.yaml"])
    assert [(row.name, str(row.config)) for row in rows] == [
        ("a", "x=y/a.yaml"), ("n", "x=y/a.yaml"), ("lr=3", "b.yaml"),
    ]  # fmt: skip


def test_the_same_training_written_differently_is_finished(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("a.yaml", "--out", "out") == 0
    assert run(f"{tmp_path}/a.yaml", "--out", f"{tmp_path}/out") == 0
    assert run("./a.yaml", "--out", "out/../out") == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    assert run("../a.yaml", "--out", "../out") == 0
    assert calls.read_text().splitlines() == ["seed_0"]


def test_a_finished_training_with_other_settings_is_kept(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a.yaml", "b.yaml", "--out", "out") == 0
    record = tmp_path / "out" / "a" / "seed_0" / command.RECORD
    (tmp_path / "a.yaml").write_text("k: 1")
    before = record.read_text()
    assert run("a.yaml", "b.yaml", "--out", "out") == 1
    said = capsys.readouterr().err
    assert f"{os.path.join('out', 'a', 'seed_0')} holds a finished training with other settings; --overwrite" in said
    assert record.read_text() == before
    assert len(calls.read_text().splitlines()) == 2
    assert run("a.yaml", "b.yaml", "--out", "out", "--overwrite") == 0
    assert json.loads(record.read_text())["config"] == {"k": 1}
    assert len(calls.read_text().splitlines()) == 3


def test_a_training_that_was_cut_off_runs_again(calls: Path, tmp_path: Path) -> None:
    assert run("a.yaml", "--out", "out") == 0
    record = tmp_path / "out" / "a" / "seed_0" / command.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    assert run("a.yaml", "--out", "out") == 0
    assert len(calls.read_text().splitlines()) == 2
