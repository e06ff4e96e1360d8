"""The callbacks on a small module whose routing is made by hand."""

import csv
import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from morsr.errors import ConfigError
from morsr.imaging.figures import GAP, HEADER
from morsr.training.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    ExpertUtilization,
    FinalValidation,
    ImageGrid,
    RunSummary,
)

Routing = namedtuple("Routing", "gates chosen probabilities")
Scores = namedtuple("Scores", "scores severity names")
Output = namedtuple("Output", "sr z0 routing scores")

LAYERS, SLOTS, TOP_K, ZERO, SHARED = 3, 12, 3, 2, 4
NAMES = ("unet.down_blocks.0.attn.to_q", "unet.mid_block.conv1", "vae.encoder.layers.1")


class Generator(nn.Module):
    """Twice enlarged input plus a trained offset; severity is the brightness, and the routing follows from it."""

    def __init__(self, kind: str = "random") -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(3, 1, 1), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(3, 1, 1))
        self.kind = kind
        config = SimpleNamespace(top_k=TOP_K, num_zero=ZERO, num_shared=SHARED, expert_rank=1, is_routed=True)
        update = lambda routing: routing.gates.sum(-1)  # noqa: E731
        adapters = SimpleNamespace(layer_names=NAMES, config=config, routed_update=update)
        self.adapters = adapters if kind != "none" else None

    def route(self, severity: Tensor) -> Routing:
        logits = torch.randn(LAYERS, len(severity), SLOTS)
        if self.kind == "collapsed":
            logits += 100 * (torch.arange(SLOTS) < TOP_K)
        elif self.kind == "severe":  # light images take both zero slots, severe ones none
            logits[..., SLOTS - ZERO :] = torch.where(severity < 0.5, 50.0, -50.0)[:, None]
        chosen = logits.topk(TOP_K, -1).indices
        gates = torch.zeros_like(logits).scatter(-1, chosen, torch.rand_like(logits))
        return Routing(gates, chosen, logits.softmax(-1))

    def forward(self, lr: Tensor) -> Output:
        severity = lr.mean((1, 2, 3))
        routing = self.route(severity) if self.adapters is not None else None
        sr = F.interpolate(lr, scale_factor=2.0) + self.offset
        return Output(sr, None, routing, Scores(severity[:, None], severity, ("brightness",)))


class Module(L.LightningModule):
    def __init__(self, kind: str = "random") -> None:
        super().__init__()
        self.generator = Generator(kind)
        self.outputs: list[Output] = []

    @property
    def last_outputs(self) -> list[Output]:
        return self.outputs[-1:]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.outputs.append(self.generator(batch["lr"]))
        return F.mse_loss(self.outputs[-1].sr, batch["hr"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        sr = self.generator(batch["lr"]).sr
        self.log("val/psnr", -10 * F.mse_loss(sr, batch["hr"]).log10(), batch_size=len(sr))
        return {"sr": sr}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.generator.offset], lr=0.05)

    def save_adapters(self, path: Path) -> None:
        save_file({"offset": self.generator.offset.detach().clone()}, path)


class Pairs(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        level = (index * 0.37) % 1
        return {"lr": torch.full((3, 8, 8), level), "hr": torch.full((3, 16, 16), (level + 0.2) / 1.2)}


def fit(folder: Path, module: Module, callbacks: list[L.Callback], *, steps: int = 12, **settings: Any) -> L.Trainer:
    ckpt_path, size = settings.pop("ckpt_path", None), settings.pop("size", 48)
    trainer = L.Trainer(**{
        "default_root_dir": folder, "max_steps": steps, "accelerator": "cpu", "callbacks": callbacks,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "logger": CSVLogger(folder), "enable_checkpointing": False, **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(Pairs(size), batch_size=4), DataLoader(Pairs(6), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def rows(folder: Path, column: str) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


def expected_use(outputs: list[Output]) -> dict[str, float]:
    """The statistics of some batches by loops over layers, images and slots."""
    real = SLOTS - ZERO
    counts, masses, effective, zeros, severities = torch.zeros(LAYERS, SLOTS), [], [], [], []
    for output in outputs:
        for layer in range(LAYERS):
            for image in range(len(output.sr)):
                for slot in output.routing.chosen[layer, image].tolist():
                    counts[layer, slot] += 1
                gates = output.routing.gates[layer, image, :real]
                masses.append(float(gates.sum()))
                parts = [float(gate / gates.sum()) for gate in gates if gate > 0]
                effective.append(float(np.exp(-sum(part * np.log(part) for part in parts))) if parts else 0.0)
                zeros.append(float((output.routing.chosen[layer, image] >= real).float().mean()))
                severities.append(float(output.scores.severity[image]))
    load = counts / counts.sum(1, keepdim=True) * SLOTS
    light = [zero for zero, severity in zip(zeros, severities, strict=True) if severity < 0.2]
    return {
        "gate_mass": float(np.mean(masses)),
        "effective_ranks": float(np.mean(effective)),
        "active_ranks": SHARED + TOP_K * (1 - float(np.mean(zeros))),
        "zero_share": float(np.mean(zeros)),
        "load_cv": float(load.std(1, correction=0).mean()),
        "max_over_mean_load": float(load.amax(1).mean()),
        "dead_slots": float((load[:, :real] < 0.1).sum(1).float().mean()),
        "zero_share_at_severity_0.0": float(np.mean(light)),
    }


@pytest.mark.parametrize("kind", ["random", "collapsed", "severe"])
def test_the_log_holds_the_use_of_the_ranks_since_the_last_log(kind, tmp_path):
    module = Module(kind)
    fit(tmp_path, module, [ExpertUtilization(every_n_steps=4)])
    found = rows(tmp_path, "watch_routing/gate_mass")
    assert [int(row["step"]) for row in found] == [4, 8, 12]
    for name, value in expected_use(module.outputs[4:8]).items():
        assert float(found[1][f"watch_routing/{name}"]) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    update = module.outputs[7].routing.gates.sum(-1).mean().item()  # of the last batch
    assert float(found[1]["watch_routing/routed_over_shared_update"]) == pytest.approx(update, abs=1e-5)
    levels = torch.cat([output.scores.severity for output in module.outputs[4:8]])
    assert float(found[1]["watch/degradation_brightness"]) == pytest.approx(levels.mean().item(), abs=1e-5)
    width = levels.std(correction=0).item()
    assert float(found[1]["watch/degradation_severity_deviation"]) == pytest.approx(width, abs=1e-5)


def test_tensorboard_gets_one_histogram_and_a_picture(tmp_path):
    fit(
        tmp_path,
        Module(),
        [ExpertUtilization(every_n_steps=4, heatmap_every_n_steps=8), ImageGrid()],
        logger=TensorBoardLogger(tmp_path),
        val_check_interval=12,
    )
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["histograms"] == ["watch_routing/load"]
    assert [event.step for event in events.Images("watch_routing/load_picture")] == [8, 12]
    assert [event.step for event in events.Images("samples/LR_ours_HR")] == [12]
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups <= {"epoch", "val", "watch", "watch_routing"}


def test_a_model_without_routing_trains_on(tmp_path):
    fit(tmp_path, Module("none"), [ExpertUtilization(every_n_steps=1), RunSummary()], steps=2)
    assert not list(tmp_path.rglob("metrics.csv")), "there was nothing to log"


def test_pictures_lie_side_by_side_and_adapters_beside_them(tmp_path):
    module, keep = Module(), AdapterCheckpoint()
    fit(tmp_path, module, [ImageGrid(num_images=3), keep], val_check_interval=12, num_sanity_val_steps=1)
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert pictures == ["before_after.png", "step_000012.png"]
    picture = np.asarray(Image.open(next(tmp_path.rglob("before_after.png"))))
    assert picture.shape == (3 * (16 + HEADER + GAP), 3 * (16 + GAP), 3)
    second = picture[16 + HEADER + GAP + HEADER :]
    assert second[5, 5, 0] == round(0.37 * 255), "bicubic of a flat image is that image"
    assert second[5, 45, 0] == round(0.57 / 1.2 * 255), "the target stands last"
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {
        "adapters-best.safetensors", "adapters.safetensors",
    }  # fmt: skip
    for path in tmp_path.rglob("*.safetensors"):
        torch.testing.assert_close(load_file(path)["offset"], module.generator.offset.detach())


def test_a_resumed_run_keeps_the_best_adapters_of_before(tmp_path):
    fit(tmp_path, Module(), [AdapterCheckpoint()], steps=4, val_check_interval=4).save_checkpoint(tmp_path / "end.ckpt")
    (best,) = tmp_path.rglob("adapters-best.safetensors")
    again = AdapterCheckpoint()
    fit(tmp_path, Module(), [again], steps=5, limit_val_batches=0, ckpt_path=tmp_path / "end.ckpt")
    kept = next(path for path in tmp_path.rglob("adapters-best.safetensors") if path != best)
    assert kept.read_bytes() == best.read_bytes()


def test_a_monitor_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(ConfigError, match="val/other"):
        fit(tmp_path, Module(), [AdapterCheckpoint(monitor="val/other")])


def test_adapters_are_kept_along_the_way(tmp_path):
    fit(tmp_path, Module(), [AdapterCheckpoint(monitor=None, keep_every=2)], steps=5, limit_val_batches=0)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.name for path in kept] == [
        "adapters-step-2.safetensors", "adapters-step-4.safetensors", "adapters.safetensors",
    ]  # fmt: skip
    assert not torch.equal(load_file(kept[0])["offset"], load_file(kept[1])["offset"])


def test_ctrl_c_leaves_the_newest_adapters(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    module, keep = Module(), AdapterCheckpoint()
    with pytest.raises(SystemExit):
        fit(tmp_path, module, [keep, Stop()], limit_val_batches=0)
    torch.testing.assert_close(
        load_file(next(tmp_path.rglob("adapters.safetensors")))["offset"], module.generator.offset.detach()
    )


@pytest.mark.parametrize("interval", [5, 100])
@pytest.mark.parametrize("length", [{"steps": 7}, {"max_epochs": 2, "steps": -1}])
def test_a_run_ends_with_a_validation(interval, length, tmp_path):
    seen: list[int] = []

    class Record(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.global_step)

    settings = {"val_check_interval": interval, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(tmp_path, Module(), [FinalValidation(), Record()], **settings, **length)
    assert seen == [*range(interval, seen[-1], interval), {"steps": 7, "max_epochs": 24}[next(iter(length))]]


def test_the_average_is_validated_and_saved_while_training_keeps_its_own(tmp_path):
    module, ema, keep = Module(), AdapterEMA(decay=0.6, warmup=5), AdapterCheckpoint()
    track, validated = [module.generator.offset.detach().clone()], []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            track.append(module.generator.offset.detach().clone())

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            validated.append(module.generator.offset.detach().clone())

    fit(tmp_path, module, [Record(), keep, ema], num_sanity_val_steps=0)
    expected = track[0]
    for step, value in enumerate(track[1:], start=1):
        expected = torch.lerp(value, expected, min(0.6, (1 + step) / (5 + step)))
    torch.testing.assert_close(validated[-1], expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    for path in tmp_path.rglob("*.safetensors"):
        torch.testing.assert_close(load_file(path)["offset"], expected)
    torch.testing.assert_close(module.generator.offset.detach(), track[-1])


def test_the_closing_message_names_what_is_there(tmp_path, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    made = [ExpertUtilization(), ImageGrid(), AdapterCheckpoint(), ModelCheckpoint(save_last=True), RunSummary()]
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="run")]
    fit(tmp_path, Module(), made, logger=loggers, enable_checkpointing=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["validation"]["val/psnr"] > 0
    assert {"checkpoint", "adapters", "adapters, best", "TensorBoard", "metrics table", "before and after",
            "load of the ranks"} <= set(summary["files"])  # fmt: skip
    for name, path in summary["files"].items():
        assert Path(path).exists(), name
        assert path in caplog.text, name
