"""`BenchmarkTable` under a trainer, with a module that is known to be better than bicubic."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import morsr.evaluation.callback as callback_module
from morsr.errors import ConfigError
from morsr.evaluation import BenchmarkTable


class Cheat(L.LightningModule):
    """Knows the answer: returns the reference of the LR image that it is given."""

    def __init__(self, answers: dict[float, torch.Tensor]) -> None:
        super().__init__()
        self.answers = answers
        self.generator = SimpleNamespace(backbone=torch.nn.Linear(1, 1))

    def forward(self, lr: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        return self.answers[round(lr.double().mean().item(), 6)]

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        return None


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    made = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        hr = (torch.rand(3, 64, 64, generator=generator) * 255).round() / 255
        lr = (torch.nn.functional.avg_pool2d(hr[None], 4)[0] * 255).round() / 255
        made.append({"lr": lr, "hr": hr, "stem": f"image{index}", "set": "first" if index < 2 else "second"})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    lists = {name: [item[name] for item in batch] for name in batch[0]}
    return {**lists, "lr": torch.stack(lists["lr"]), "hr": torch.stack(lists["hr"])}


class Pairs(L.LightningDataModule):
    def __init__(self, pairs: list[dict[str, Any]], scale: int) -> None:
        super().__init__()
        self.pairs, self.scale = pairs, scale

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.pairs, batch_size=1, collate_fn=collate)


def run(
    pairs: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, *, scale: int = 4
) -> BenchmarkTable:
    monkeypatch.setattr(callback_module, "active_adapters", lambda *_: nullcontext())
    table = BenchmarkTable(metrics=["psnr", "ssim"], out=str(folder))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[table], enable_progress_bar=False, default_root_dir=folder,
        enable_checkpointing=False,
    )  # fmt: skip
    answers = {round(pair["lr"].double().mean().item(), 6): pair["hr"][None] for pair in pairs}
    trainer.test(Cheat(answers), Pairs(pairs, scale), verbose=False)
    return table


def test_other_scales_get_their_rows_too(pairs: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pair in pairs:
        pair["lr"] = (torch.nn.functional.avg_pool2d(pair["hr"][None], 2)[0] * 255).round() / 255
    table = run(pairs, tmp_path, monkeypatch, scale=2)
    assert table.reports["first"].mean("bicubic", "psnr") < table.reports["first"].mean("morsr", "psnr")


def test_each_set_gets_its_own_table(pairs: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run(pairs, tmp_path, monkeypatch)
    assert set(table.reports) == {"first", "second"}
    rows = list(csv.DictReader((tmp_path / "first" / "scores.csv").open()))
    assert {row["method"] for row in rows} == {"bicubic", "nlm+bicubic", "bilateral+bicubic", "base", "morsr"}
    assert {row["image"] for row in rows} == {"image0", "image1"}


def test_a_perfect_model_is_better_than_every_other_row(
    pairs: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(pairs, tmp_path, monkeypatch).reports["first"]
    assert report.mean("morsr", "ssim") == pytest.approx(1.0, abs=1e-6)
    for other in ("bicubic", "nlm+bicubic", "bilateral+bicubic"):
        assert report.difference("morsr", "psnr", other).low > 10
    text = (tmp_path / "first" / "scores.md").read_text()
    assert "morsr against nlm+bicubic" in text
    assert (tmp_path / "first" / "side_by_side.png").is_file()


def test_several_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices"):
        BenchmarkTable().setup(SimpleNamespace(world_size=2), None, "test")  # type: ignore[arg-type]
