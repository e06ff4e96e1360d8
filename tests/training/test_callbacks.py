"""The callbacks on a small module whose routing is made by hand."""

from __future__ import annotations

import csv
import json
import warnings
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

from morsr.errors import ConfigError, WeightsError
from morsr.training.callbacks import AdapterCheckpoint, AdapterEMA, ExpertUtilization, ImageGrid, RunSummary
from morsr.training.callbacks.window import RoutingWindow

Routing = namedtuple("Routing", "gates chosen probabilities")
Scores = namedtuple("Scores", "scores severity names")
Output = namedtuple("Output", "sr z0 routing scores")

LAYERS, SLOTS, TOP_K, ZERO = 3, 12, 3, 2
NAMES = ("unet.down_blocks.0.attn.to_q", "unet.mid_block.conv1", "vae.encoder.layers.1")


class Generator(nn.Module):
    """Twice enlarged input plus a trained offset; severity is the brightness, and the routing follows from it."""

    def __init__(self, kind: str = "random") -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(3, 1, 1), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(3, 1, 1))
        self.kind = kind
        config = SimpleNamespace(top_k=TOP_K, num_zero=ZERO, num_shared=4, expert_rank=1, is_routed=True)
        self.context = SimpleNamespace(layer_names=NAMES, config=config) if kind != "none" else None

    def route(self, severity: Tensor) -> Routing:
        logits = torch.randn(LAYERS, len(severity), SLOTS)
        if self.kind == "collapsed":
            logits += 100 * (torch.arange(SLOTS) < TOP_K)
        elif self.kind == "by process":
            rank = torch.distributed.get_rank()
            logits += 100 * ((torch.arange(SLOTS) // TOP_K) == rank)
        elif self.kind == "severe":  # light images take both zero slots, severe ones none
            logits[..., SLOTS - ZERO :] = torch.where(severity < 0.5, 50.0, -50.0)[:, None]
        probabilities = logits.softmax(-1)
        chosen = logits.topk(TOP_K, -1).indices
        return Routing(torch.zeros_like(logits).scatter(-1, chosen, 1.0), chosen, probabilities)

    def forward(self, lr: Tensor) -> Output:
        severity = lr.mean((1, 2, 3))
        sr = F.interpolate(lr, scale_factor=2.0) + self.offset
        routing = self.route(severity) if self.context is not None else None
        return Output(sr, None, routing, Scores(severity[:, None], severity, ("brightness",)))


class Module(L.LightningModule):
    def __init__(self, kind: str = "random") -> None:
        super().__init__()
        self.generator = Generator(kind)
        self.last_output: Output | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_output = self.generator(batch["lr"])
        return F.mse_loss(self.last_output.sr, batch["hr"])

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
    settings = {"logger": CSVLogger(folder), "enable_checkpointing": False, **settings}
    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(Pairs(size), batch_size=4), DataLoader(Pairs(6), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def rows(folder: Path, column: str) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


def test_scalars_reach_the_csv_logger_at_the_right_steps(tmp_path: Path):
    fit(tmp_path, Module(), [ExpertUtilization(every_n_steps=4)])
    found = rows(tmp_path, "routing/load_entropy")
    assert [int(row["step"]) for row in found] == [4, 8, 12]
    assert 0.5 < float(found[0]["routing/load_entropy"]) <= 1
    assert float(found[0]["routing/active_ranks"]) == pytest.approx(4 + 3 * (1 - float(found[0]["routing/zero_share"])))
    assert "routing_active_ranks/unet.down_blocks.0" in found[0]


def test_a_window_holds_exactly_the_images_since_the_last_log(tmp_path: Path):
    watch = ExpertUtilization(every_n_steps=4)
    module = Module()
    counts: list[Tensor] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(F.one_hot(module.last_output.routing.chosen, SLOTS).sum((1, 2)))

    fit(tmp_path, module, [Record(), watch], steps=6)
    # The closing picture joins the last full window (steps 1 to 4) and the rest (steps 5 and 6).
    assert watch.latest.images == 24
    expected = torch.stack(counts).sum(0).double()
    torch.testing.assert_close(watch.latest.load, expected / expected.sum(1, keepdim=True))


def test_a_run_shorter_than_a_window_is_logged_at_its_end(tmp_path: Path):
    fit(tmp_path, Module(), [ExpertUtilization(every_n_steps=50)], steps=6)
    assert [int(row["step"]) for row in rows(tmp_path, "routing/load_entropy")] == [6]


def test_gradient_accumulation_counts_every_micro_batch_and_logs_by_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    watch = ExpertUtilization(every_n_steps=2)
    seen: list[int] = []
    original = RoutingWindow.take
    monkeypatch.setattr(
        RoutingWindow, "take", lambda self, trainer: seen.append(self.images) or original(self, trainer)
    )
    fit(tmp_path, Module(), [watch], steps=4, accumulate_grad_batches=3)
    assert seen[:2] == [24, 24], "2 steps of 3 micro-batches of 4 images"
    assert [int(row["step"]) for row in rows(tmp_path, "routing/load_entropy")] == [2, 4]


def test_tensorboard_gets_scalars_and_heat_maps(tmp_path: Path):
    fit(
        tmp_path,
        Module(),
        [ExpertUtilization(every_n_steps=4, heatmap_every_n_steps=8)],
        logger=TensorBoardLogger(tmp_path),
    )
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    assert "routing/dead_share" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("routing/load")] == [8, 12]


@pytest.mark.parametrize(("kind", "warned"), [("collapsed", True), ("random", False)])
def test_a_collapsed_router_is_warned_of_once(tmp_path: Path, kind: str, warned: bool):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Module(kind), [ExpertUtilization(every_n_steps=10)], steps=24)
    messages = [str(w.message) for w in caught if "collapsed" in str(w.message)]
    assert len(messages) == int(warned)
    if warned:
        assert "in 3 of 3 layers at step 10" in messages[0]
        assert "70% of its experts dead" in messages[0]
        assert float(rows(tmp_path, "routing/collapsed_layers")[0]["routing/collapsed_layers"]) == 3


def test_correlation_of_zero_share_and_severity(tmp_path: Path):
    fit(tmp_path, Module("severe"), [ExpertUtilization(every_n_steps=12)])
    row = rows(tmp_path, "routing/zero_severity_spearman")[0]
    assert float(row["routing/zero_severity_spearman"]) < -0.8


def test_scores_of_every_batch_are_logged(tmp_path: Path):
    fit(tmp_path, Module(), [ExpertUtilization(every_n_steps=12)])
    row = rows(tmp_path, "degradation/brightness")[0]
    levels = torch.tensor([(index * 0.37) % 1 for index in range(48)])
    assert float(row["degradation/brightness"]) == pytest.approx(levels.mean().item(), abs=1e-5)
    assert float(row["degradation/severity"]) == pytest.approx(levels.mean().item(), abs=1e-5)
    width = levels.std(correction=0).item()
    assert float(row["degradation_deviation/brightness"]) == pytest.approx(width, abs=1e-5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (8, [("8", "16")]),  # nothing is new at the end
        (10, [("8", "16"), ("10", "24")]),  # at the end with the last whole window, which would be a few images else
        (12, [("8", "16"), ("12", "16")]),  # nothing is new, but the last log was not drawn
    ],
)
def test_every_layer_has_a_line_in_the_table_of_the_run(steps: int, expected: list[tuple[str, str]], tmp_path: Path):
    watch = ExpertUtilization(every_n_steps=4, heatmap_every_n_steps=8)
    fit(tmp_path, Module("severe"), [watch], steps=steps)
    with next(tmp_path.rglob("expert_utilization.csv")).open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["layer"], line["images"]) for line in lines] == [
        (step, name, images) for step, images in expected for name in NAMES
    ]
    for line, load, ranks in zip(lines[-LAYERS:], watch.latest.load, watch.latest.ranks, strict=True):
        found = torch.tensor([float(line[f"load_{slot}"]) for slot in range(SLOTS)], dtype=torch.float64)
        torch.testing.assert_close(found, load, rtol=1e-5, atol=1e-6)
        assert float(line["active_ranks"]) == pytest.approx(ranks.item(), rel=1e-5)
        assert float(line["zero_severity_spearman"]) < -0.8


def test_a_log_copies_to_the_host_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copies: list[tuple[int, ...]] = []
    for name in ("cpu", "item", "tolist", "numpy"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments: Any, original: Any = original, **options: Any) -> Any:
            if self.dtype == torch.float32:  # what has been copied is worked on in float64
                copies.append(tuple(self.shape))
            return original(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, counted)
    watch = ExpertUtilization(every_n_steps=1, heatmap_every_n_steps=0)
    module = Module()
    module.last_output = module.generator(torch.rand(4, 3, 8, 8))
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=1, loggers=[], is_global_zero=True, log_dir=str(tmp_path)
    )  # fmt: skip
    watch.on_fit_start(trainer, module)
    watch.on_train_start(trainer, module)
    copies.clear()
    watch.on_train_batch_end(trainer, module, None, None, 0)
    assert copies == [], "a batch is only added up"
    trainer.global_step = 1
    watch.on_train_batch_end(trainer, module, None, None, 1)
    assert len(copies) == 1
    assert watch.latest.images == 8


@pytest.mark.slow
def test_two_processes_are_added_up(tmp_path: Path):
    class Tell(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            usage, rank = watch.latest, trainer.global_rank
            told = {"load": usage.load.tolist(), "images": usage.images, "pairs": len(watch.severity)}
            (tmp_path / f"{rank}.json").write_text(json.dumps(told))

    watch = ExpertUtilization(every_n_steps=3)
    fit(tmp_path, Module("by process"), [watch, Tell()], steps=3, devices=2, strategy="ddp_fork")
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["images"] == told["pairs"] == 2 * 3 * 4
        # Each process sends all its images to three slots of its own.
        assert told["load"] == [[pytest.approx(1 / 6)] * 6 + [0] * 6] * LAYERS
    assert len(rows(tmp_path, "routing/load_entropy")) == 1


def test_a_model_without_routing_trains_on(tmp_path: Path):
    watch = ExpertUtilization(every_n_steps=1)
    fit(tmp_path, Module("none"), [watch, RunSummary()], steps=2)
    assert watch.latest is None
    assert not list(tmp_path.rglob("metrics.csv")), "there was nothing to log"
    assert not list(tmp_path.rglob("expert_utilization.png"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExpertUtilization(every_n_steps=0),
        lambda: ExpertUtilization(min_spread=2),
        lambda: AdapterEMA(decay=1.0),
        lambda: ImageGrid(num_images=0),
        lambda: AdapterCheckpoint(mode="best"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(make: Any):
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_pictures_lie_side_by_side(tmp_path: Path):
    fit(tmp_path, Module(), [ImageGrid(num_images=3)], val_check_interval=12, num_sanity_val_steps=1)
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert pictures == ["before_after.png", "step_000012.png"]
    picture = np.asarray(Image.open(next(tmp_path.rglob("before_after.png"))))
    assert picture.shape == (20 + 3 * 16 + 2 * 4, 3 * 16 + 2 * 4, 3)
    second = picture[20 + 16 + 4 : 20 + 32 + 4]
    assert second[5, 5, 0] == round(0.37 * 255), "bicubic of a flat image is that image"
    assert second[5, 45, 0] == round(0.57 / 1.2 * 255), "the target stands last"


def test_adapters_are_written_at_the_end_and_when_best(tmp_path: Path):
    module = Module()
    keep = AdapterCheckpoint()
    fit(tmp_path, module, [keep], val_check_interval=6)
    assert keep.last_path is not None
    assert keep.best_path is not None
    torch.testing.assert_close(load_file(keep.last_path)["offset"], module.generator.offset.detach())
    assert keep.best_path.name == "adapters-best.safetensors"
    assert not list(tmp_path.rglob("*.part*"))


def test_a_monitor_that_is_not_logged_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'val/other' is not logged; logged are: .*val/psnr"):
        fit(tmp_path, Module(), [AdapterCheckpoint(monitor="val/other")])


def test_ctrl_c_leaves_the_newest_adapters(tmp_path: Path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise KeyboardInterrupt

    module, keep = Module(), AdapterCheckpoint()
    with pytest.raises(SystemExit):
        fit(tmp_path, module, [Stop(), keep])
    torch.testing.assert_close(load_file(keep.last_path)["offset"], module.generator.offset.detach())


def test_ema_is_validated_and_saved_while_training_keeps_its_own(tmp_path: Path):
    module, ema, keep = Module(), AdapterEMA(decay=0.5, warmup=0), AdapterCheckpoint()
    track, validated = [module.generator.offset.detach().clone()], []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            track.append(module.generator.offset.detach().clone())

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            validated.append(module.generator.offset.detach().clone())

    fit(tmp_path, module, [Record(), keep, ema], num_sanity_val_steps=0)
    expected = track[0]
    for value in track[1:]:
        expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(validated[-1], expected)
    torch.testing.assert_close(load_file(keep.last_path)["offset"], expected)
    torch.testing.assert_close(load_file(keep.best_path)["offset"], expected)
    torch.testing.assert_close(module.generator.offset.detach(), track[-1])


def test_ema_is_in_place_for_test_and_prediction_until_all_callbacks_are_done(tmp_path: Path):
    class Tested(Module):
        def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            pass

        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.generator.offset.detach().clone()

    class Late(L.Callback):
        """As `BenchmarkTable`, which works at the end of the test, after callbacks that were listed before it."""

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(module.generator.offset.detach().clone())

    module, ema = Tested(), AdapterEMA(decay=0.5, warmup=0)
    seen: list[Tensor] = []
    trainer = fit(tmp_path, module, [ema, Late()])
    raw, average = module.generator.offset.detach().clone(), ema.state_dict()["average"]
    (expected,) = [value for name, value in average.items() if name.endswith("offset")]
    assert not torch.equal(raw, expected)
    loader = DataLoader(Pairs(4), batch_size=2)
    trainer.test(module, loader, verbose=False)
    seen += trainer.predict(module, loader)
    assert len(seen) == 3
    for value in seen:
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(module.generator.offset.detach(), raw)


def test_ema_resumes_as_if_never_stopped(tmp_path: Path):
    straight, resumed = AdapterEMA(decay=0.9), AdapterEMA(decay=0.9)
    whole = Module()
    fit(tmp_path / "a", whole, [straight], steps=12, size=24)
    half = [AdapterEMA(decay=0.9), ModelCheckpoint(tmp_path / "b" / "kept", save_last=True)]
    fit(tmp_path / "b", Module(), half, steps=6, size=24, enable_checkpointing=True)
    module = Module()
    fit(tmp_path / "c", module, [resumed], steps=12, size=24, ckpt_path=tmp_path / "b" / "kept" / "last.ckpt")
    torch.testing.assert_close(module.generator.offset, whole.generator.offset, rtol=0, atol=0)
    for name, value in straight.state_dict()["average"].items():
        torch.testing.assert_close(resumed.state_dict()["average"][name], value, rtol=0, atol=0)
    assert resumed.updates == 12


def test_ema_of_another_model_is_refused(tmp_path: Path):
    ema = AdapterEMA()
    ema.load_state_dict({"updates": 3, "average": {"other": torch.zeros(2)}})
    with pytest.raises(WeightsError, match="does not fit the model"):
        fit(tmp_path, Module(), [ema], num_sanity_val_steps=0)


def test_the_summary_names_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any):
    summary = RunSummary()
    callbacks = [summary, ExpertUtilization(), ImageGrid(), AdapterCheckpoint(), ModelCheckpoint(save_last=True)]
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="run")]
    with caplog.at_level("INFO"):
        fit(tmp_path, Module(), callbacks, val_check_interval=6, logger=loggers, enable_checkpointing=True)
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(facts["files"]) >= {
        "run folder", "checkpoint", "adapters", "adapters, best", "TensorBoard", "metrics table", "before and after",
        "use of the ranks",
    }  # fmt: skip
    assert all(Path(path).exists() for path in facts["files"].values())
    assert [entry["step"] for entry in facts["validation"]] == [6, 12]
    plot = np.asarray(Image.open(facts["files"]["use of the ranks"]))
    assert plot.shape[0] > 600
    assert plot.std() > 20
