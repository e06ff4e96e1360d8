"""What validations leave: scores and routing of mixed sets and of several processes, and metrics without a value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morsr.errors import InputError
from morsr.evaluation.ablation import Ablation, Run, read_run
from morsr.evaluation.callback import _against_all
from morsr.evaluation.comparison import read_groups, read_scores
from morsr.evaluation.dump import RoutingDump
from morsr.evaluation.routing import RoutingTable
from morsr.evaluation.score_dump import ScoreDump
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.models.metrics import metric_info


def trainer(folder: Path, *, processes: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(
        sanity_checking=False, world_size=processes, global_rank=rank, global_step=7, log_dir=str(folder)
    )


def routing(names: list[str], *, known: bool, zero: int = 0) -> RoutingTable:
    count = len(names)
    slots = torch.tensor([0] * (2 - zero) + [3] * zero).expand(count, 1, 2)
    return RoutingTable(
        names=tuple(names), layer_names=("l",), score_names=("s",), scores=torch.rand(count, 1),
        severity=torch.rand(count), chosen=slots, gates=torch.ones(count, 1, 2), num_slots=4, num_zero=1, num_shared=0,
        truth={"noise": torch.rand(count)} if known else {}, parameters=("{}",) * count if known else (),
    )  # fmt: skip


def test_routing_of_photographs_and_pairs_is_written(tmp_path: Path) -> None:
    dump = RoutingDump()
    dump._parts = [routing(["a"], known=True), routing(["b"], known=False)]
    dump.on_validation_end(trainer(tmp_path), None)  # type: ignore[arg-type]
    table = RoutingTable.load(tmp_path / "routing" / "step_000007.safetensors")
    assert (table.names, dict(table.truth), table.parameters) == (("a", "b"), {}, ())


def validate(folder: Path, stems: list[str], sets: list[str], **process: int) -> Path:
    dump, where = ScoreDump(metrics=["psnr"]), trainer(folder, **process)
    hr = torch.rand(len(stems), 3, 16, 16)
    batch = {"hr": hr, "lr": hr[..., ::4, ::4], "stem": stems, "set": sets, "image": [s[0] for s in stems]}
    dump.on_validation_start(where, None)  # type: ignore[arg-type]
    dump.on_validation_batch_end(where, None, {"sr": hr}, batch, 0)  # type: ignore[arg-type]
    dump.on_validation_end(where, None)  # type: ignore[arg-type]
    assert dump.latest is not None
    return dump.latest


def test_equal_stems_of_two_sets_are_two_images(tmp_path: Path) -> None:
    latest = validate(tmp_path, ["a_0", "a_1", "a_0", "a_1"], ["one", "one", "two", "two"])
    names = ["one:a_0", "one:a_1", "two:a_0", "two:a_1"]
    assert list(read_scores(latest)["morsr"]["psnr"]) == names
    assert read_groups(latest) == {name: name[:5] for name in names}
    latest = validate(tmp_path, ["a_0", "b_1"], ["one", "two"])
    assert list(read_scores(latest)["morsr"]["psnr"]) == ["a_0", "b_1"]


def test_equal_stems_on_two_processes_are_two_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(parts: list[Any], own: Any) -> None:
        parts[:] = [own, {("two", "a_0")}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    latest = validate(tmp_path, ["a_0"], ["one"], processes=2)
    assert list(read_scores(latest)["morsr"]["psnr"]) == ["one:a_0"]


def test_images_that_another_process_has_are_not_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {
        "hr": torch.rand(2, 3, 16, 16), "lr": torch.rand(2, 3, 4, 4), "stem": ["c", "a"], "repeated": [False, True]
    }  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr(
        RoutingTable, "from_images", lambda module, lr, *rest, names, **more: seen.append((len(lr), names))
    )
    module = SimpleNamespace(generator=SimpleNamespace(context=SimpleNamespace(config=SimpleNamespace(is_routed=True))))
    dump, scores, where = RoutingDump(), ScoreDump(metrics=["psnr"]), trainer(tmp_path)
    where.datamodule = None
    dump.on_validation_batch_end(where, module, None, batch, 0)  # type: ignore[arg-type]
    assert seen == [(1, ["c"])]
    scores.on_validation_batch_end(where, module, {"sr": batch["hr"]}, batch, 0)  # type: ignore[arg-type]
    assert [row.image for row in scores._rows] == ["c", "c"]


def test_a_run_on_several_devices_is_read_whole(tmp_path: Path) -> None:
    for step in ("step_000003.0", "step_000003.1"):
        (tmp_path / "scores").mkdir(exist_ok=True)
        (tmp_path / "scores" / f"{step}.csv").write_text("image,method,psnr\nold,morsr,1\n")
    for rank in range(2):
        validate(tmp_path, [f"a_{rank}", f"b_{rank}"], ["one", "one"], processes=2, rank=rank)
        part = routing([f"a_{rank}", f"b_{rank}"], known=not rank, zero=2 * rank)
        part.save(tmp_path / "routing" / f"step_000007.{rank}.safetensors")
    run = read_run(tmp_path, seed=0, ranks=2)
    assert set(run.scores["psnr"]) == set(run.bicubic["psnr"]) == {"a_0", "b_0", "a_1", "b_1"}
    assert run.groups == {name: name[0] for name in run.scores["psnr"]}
    assert run.zero_share == pytest.approx(0.5)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    for step in (999999, 1000000):
        (tmp_path / "scores" / f"step_{step}.csv").write_text(f"image,method,psnr\na,morsr,{step}\n")
    assert read_run(tmp_path, seed=0, ranks=1).scores["psnr"] == {"a": 1000000}


def test_the_last_table_shows_a_metric_without_a_value() -> None:
    rows = [
        ImageScore(f"i{index}", method, {"psnr": 20.0 + index, "niqe": math.nan}, group="one")
        for method in ("bicubic", "morsr")
        for index in range(3)
    ]
    report = BenchmarkReport(rows=rows, metrics=[metric_info("psnr"), metric_info("niqe")], reference="bicubic")
    (line,) = _against_all(report, "morsr")
    assert line.startswith("morsr against bicubic: psnr +0.0000 [")
    assert line.endswith(", niqe –")


def made_run(seed: int, value: float) -> Run:
    scores = {"psnr": {"a": value, "b": value}, "niqe": {"a": math.nan, "b": math.nan}}
    return Run(seed, scores, scores, active=3.5)


def test_an_ablation_shows_what_has_no_value(tmp_path: Path) -> None:
    rows = {"plain": [made_run(0, 20)], "late": [made_run(1, 20)], "ours": [made_run(0, 21), made_run(2, 21)]}
    table = Ablation(rows, "ours")
    files = table.save(tmp_path)
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in files["md"].read_text().splitlines()[-2:]}
    assert lines["| plain"][0].startswith("-1.0000")
    assert lines["| plain"][1] == lines["| late"][1] == "– |"
    assert lines["| late"][0] == "–"
    assert "nan" not in files["md"].read_text()
    found = json.loads(files["json"].read_text(), parse_constant=pytest.fail)["rows"]
    assert found["plain"]["metrics"]["niqe"] == {"mean": None, "spread": None, "difference": None}
    assert found["late"]["metrics"]["psnr"]["difference"] is None
    with pytest.raises(InputError, match="no seed in common"):
        table.difference("late", "psnr")
