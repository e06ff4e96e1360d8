"""The ablation: intervals over seeds and images, scores of single images, and the command that trains the rows."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from morsr.commands import ablation as command
from morsr.errors import ConfigError, InputError
from morsr.evaluation.ablation import Ablation, Run
from morsr.evaluation.comparison import read_groups, read_scores
from morsr.evaluation.score_dump import ScoreDump
from morsr.functional.quality import bootstrap_crossed, psnr_y, quantize_8bit
from morsr.models import metrics


def crossed(seeds: float, images: float, shape: tuple[int, int] = (8, 60)) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 1.0 + seeds * rng.normal(size=(shape[0], 1)) + images * rng.normal(size=(1, shape[1]))


@pytest.mark.parametrize(("seeds", "images"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_interval_covers_seeds_and_images(seeds: float, images: float) -> None:
    values = crossed(seeds, images)
    mean, low, high = bootstrap_crossed(values)
    by_seed, by_image = values.mean(1).var(), values.mean(0).var()  # of the sample, as the bootstrap has it
    expected = 1.96 * (by_seed / values.shape[0] + by_image / values.shape[1]) ** 0.5
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)


def test_photographs_are_resampled_whole() -> None:
    values = np.repeat(crossed(0.0, 0.5, (4, 12)), 5, axis=1)
    groups = np.repeat(np.arange(12), 5)
    alone, whole = bootstrap_crossed(values), bootstrap_crossed(values, groups=groups)
    assert whole[2] - whole[1] == pytest.approx((alone[2] - alone[1]) * 5**0.5, rel=0.1)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.nan)])
def test_crossed_bootstrap_refuses_what_is_no_table(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="seeds, images"):
        bootstrap_crossed(bad)
    with pytest.raises(InputError, match="one group per image"):
        bootstrap_crossed(np.zeros((2, 3)), groups=np.zeros(2))


def test_score_dump_writes_what_the_saved_images_would_score(tmp_path: Path) -> None:
    dump = ScoreDump(metrics=["psnr"])
    trainer = SimpleNamespace(
        sanity_checking=False, world_size=1, global_rank=0, global_step=7, log_dir=str(tmp_path), default_root_dir="."
    )
    hr = quantize_8bit(torch.rand(2, 3, 32, 32))
    batch = {"hr": hr, "lr": hr[..., ::4, ::4], "stem": ["a_0", "a_1"], "image": ["a", "a"]}
    sr = quantize_8bit((hr + 0.1 * torch.randn_like(hr)).clamp(0, 1))
    dump.on_validation_start(trainer, None)  # type: ignore[arg-type]
    dump.on_validation_batch_end(trainer, None, {"sr": sr}, batch, 0)  # type: ignore[arg-type]
    dump.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert dump.latest == tmp_path / "scores" / "step_000007.csv"
    scores = read_scores(dump.latest)
    assert list(scores["morsr"]["psnr"].values()) == pytest.approx(psnr_y(sr, hr).tolist(), abs=1e-5)
    assert set(scores) == {"morsr", "bicubic"}
    assert read_groups(dump.latest) == {"a_0": "a", "a_1": "a"}
    assert scores["bicubic"]["psnr"] != scores["morsr"]["psnr"]


def test_score_dump_refuses_metrics_over_sets() -> None:
    with pytest.raises(ConfigError, match="single images"):
        ScoreDump(metrics=["psnr", "fid"])


def made_run(seed: int, offset: float, *, images: int = 20, **more: float) -> Run:
    rng = np.random.default_rng(seed)
    base = 20 + np.arange(images) % 5 + rng.normal(size=images)
    names = [f"image{index}" for index in range(images)]
    scores = dict(zip(names, (base + offset).tolist(), strict=True))
    bicubic = dict.fromkeys(names, 19.0)
    return Run(seed, {"psnr": scores}, {"psnr": bicubic}, ranks=10, active=3.5, **more)


def test_rows_are_paired_by_seed_and_image() -> None:
    table = Ablation(
        {"plain": [made_run(s, 0.0) for s in (2, 0, 1)], "ours": [made_run(s, 0.3) for s in range(3)]}, "ours"
    )
    value = table.difference("plain", "psnr")
    assert (value.mean, value.low, value.high) == pytest.approx((-0.3, -0.3, -0.3))
    assert value.verdict(lower_is_better=False) == "worse"
    assert table.difference("ours", "psnr", "bicubic").mean == pytest.approx(table.mean("ours", "psnr") - 19.0)
    text = table.to_markdown()
    assert "| bicubic" in text
    assert "worse" in text
    assert "3.50" in text


def test_one_photograph_says_nothing_of_others() -> None:
    one = [made_run(0, offset, images=5) for offset in (0.0, 0.4287)]
    groups = dict.fromkeys(one[0].scores["psnr"], "photograph")
    runs = [Run(run.seed, run.scores, run.bicubic, groups) for run in one]
    table = Ablation({"plain": [runs[0]], "ours": [runs[1]]}, "plain")
    assert table.difference("ours", "psnr").verdict(lower_is_better=False) == "not distinguishable"
    assert "+0.4287 [+0.4287, +0.4287], not distinguishable" in table.to_markdown()


def test_the_heading_says_what_the_intervals_go_over() -> None:
    def heading(*seeds: int) -> str:
        rows = {"ours": [made_run(seed, 0.3) for seed in range(2)]}
        rows |= {f"row{count}": [made_run(seed, 0.0) for seed in range(count)] for count in seeds}
        return next(line for line in Ablation(rows, "ours").to_markdown().splitlines() if line.startswith("Difference"))

    assert heading(2).endswith("over seeds and photographs:")
    assert heading(1).endswith("intervals over photographs:")
    assert heading(1, 2).endswith("over photographs, and over seeds where a row shares several with it:")


def test_rows_that_share_nothing_are_refused() -> None:
    table = Ablation({"plain": [made_run(0, 0.0)], "ours": [made_run(1, 0.3)]}, "ours")
    with pytest.raises(InputError, match="no seed in common"):
        table.difference("plain", "psnr")
    with pytest.raises(ConfigError, match="no row 'other'"):
        Ablation({"plain": [made_run(0, 0.0)]}, "other")
    with pytest.raises(InputError, match="plain: 0"):
        Ablation({"plain": []}, "plain")


def test_sweeps_make_rows() -> None:
    rows = list(command.expand([command.Row("a", Path("a.yaml")), command.Row("b", Path("b.yaml"))],
                               ["model.adapters.balance_alpha=0.1,1"], ["trainer.max_steps=5"]))  # fmt: skip
    assert [row.name for row in rows] == [f"{n}, balance_alpha={v}" for n in "ab" for v in ("0.1", "1")]
    assert rows[1].overrides == ("--trainer.max_steps=5", "--model.adapters.balance_alpha=1")
    assert len({row.slug for row in rows}) == 4
    assert not set("/, ") & set("".join(row.slug for row in rows))
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        list(command.expand([], ["alpha"], []))


FAKE = """#!{python}
import os, pathlib, sys
print("threads", os.environ["OMP_NUM_THREADS"])
options = dict(a.split("=", 1) for a in sys.argv[3:] if "=" in a)
base = "--trainer.logger.init_args."
folder = pathlib.Path(options[base + "save_dir"]) / options[base + "name"] / options[base + "version"]
with open({calls!r}, "a") as stream:
    stream.write(folder.name + " " + options["--config"] + "\\n")
if "{broken}" in options["--config"] and options["--seed_everything"] == "1":
    sys.exit("no such luck")
(folder / "scores").mkdir(parents=True)
value = 20 + int(options["--seed_everything"]) + ("ours" in options["--config"])
(folder / "scores" / "step_000005.csv").write_text(f"image,method,psnr\\na,bicubic,19\\na,morsr,{{value}}\\n")
(folder / "config.yaml").write_text("model: {{init_args: {{adapters: {{num_ranks: 10}}}}}}")
"""


def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, *, broken: str = "nothing") -> Path:
    script, calls = folder / "fake", folder / "calls.txt"
    script.write_text(FAKE.format(python=sys.executable, calls=str(calls), broken=broken))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    for name in ("plain.yaml", "ours.yaml"):
        (folder / name).write_text("{}")
    return calls


def options(folder: Path, *more: str) -> Namespace:
    parser = ArgumentParser()
    command.add_arguments(parser)
    rows = [str(folder / "plain.yaml"), f"OURS={folder / 'ours.yaml'}"]
    return parser.parse_args([*rows, "--seeds", "0", "1", "--out", str(folder / "out"), "--jobs", "2", *more])


def test_every_row_and_seed_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake(monkeypatch, tmp_path)
    assert command.run(options(tmp_path)) == 0
    assert len(calls.read_text().splitlines()) == 4
    table = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert table["reference"] == "OURS"
    assert table["rows"]["plain"]["seeds"] == [0, 1]
    assert table["rows"]["plain"]["metrics"]["psnr"]["difference"]["mean"] == pytest.approx(-1)
    assert "| OURS" in capsys.readouterr().out
    assert command.run(options(tmp_path)) == 0
    assert len(calls.read_text().splitlines()) == 4, "finished trainings run again"
    assert command.run(options(tmp_path, "--set", "trainer.max_steps=9", "--overwrite")) == 0
    assert len(calls.read_text().splitlines()) == 8, "other settings must train anew"
    with pytest.raises(InputError, match="got none"):
        command.run(options(tmp_path, "--report-only"))  # what is there was trained with other settings


def test_a_row_whose_config_changed_is_kept_unless_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake(monkeypatch, tmp_path)
    (tmp_path / "above.yaml").write_text("trainer: {max_steps: 3}")
    (tmp_path / "ours.yaml").write_text("extends: above.yaml")
    assert command.run(options(tmp_path)) == 0
    (tmp_path / "above.yaml").write_text("trainer: {max_steps: 5}")
    assert command.run(options(tmp_path, "--reference", "plain")) == 1
    assert len(calls.read_text().splitlines()) == 4
    assert "holds a finished training with other settings; --overwrite" in capsys.readouterr().err
    assert command.run(options(tmp_path, "--overwrite")) == 0
    ours = [line for line in calls.read_text().splitlines() if "ours" in line]
    assert (len(ours), len(calls.read_text().splitlines())) == (4, 6)


def test_columns_of_other_tables_have_the_direction_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"brisque": {"metric_mode": "NR", "lower_better": True}}
    monkeypatch.setattr(metrics, "_pyiqa_configs", lambda: configs)
    runs = {name: [made_run(seed, offset) for seed in range(3)] for name, offset in (("plain", 0.3), ("ours", 0.0))}
    for every in runs.values():
        for run in every:
            run.scores.update({"brisque": dict(run.scores["psnr"]), "beauty": dict(run.scores["psnr"])})
    head, plain = (line for line in Ablation(runs, "ours").to_markdown().splitlines()[-3:] if "---" not in line)
    cells = dict(zip(head.split(" | "), plain.split(" | "), strict=True))
    assert cells["psnr ↑"].endswith("better")
    assert cells["brisque ↓"].endswith("worse")
    assert next(text for name, text in cells.items() if name.startswith("beauty")).rstrip(" |").endswith("higher")


@pytest.mark.parametrize(("given", "seen"), [(None, 4), ("3", 3)])
def test_trainings_share_the_cores_unless_threads_are_given(
    given: str | None, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert command.run(options(tmp_path)) == 0
    for log in (tmp_path / "out").rglob("log.txt"):
        assert log.read_text().splitlines()[0] == f"threads {seen}"


def test_a_failed_training_is_named_and_the_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake(monkeypatch, tmp_path, broken="plain")
    assert command.run(options(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "plain, seed 1: exit code 1; no such luck" in captured.err
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]["plain"]["seeds"] == [0]
    assert command.run(options(tmp_path, "--report-only")) == 0
    command.run(options(tmp_path))
    assert len(calls.read_text().splitlines()) == 5, "only the failed training runs again"


def test_a_folder_of_others_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, tmp_path)
    mine = tmp_path / "out" / "plain" / "seed_0" / "diary.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("dear diary")
    assert command.run(options(tmp_path)) == 1
    assert mine.read_text() == "dear diary"
    assert "holds no training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--reference", "nobody"], "no row 'nobody'"), (["--seeds", "1", "1"], "different numbers")],
)
def test_wrong_options_are_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    calls = fake(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=message):
        command.run(options(tmp_path, *more))
    assert not calls.exists()


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config"):
        command.parse_rows([str(tmp_path / "gone.yaml")])
