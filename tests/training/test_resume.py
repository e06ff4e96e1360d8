"""A run that was stopped goes on as if it never had been, with all three networks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import training_twins as twins
from lightning.pytorch.callbacks import ModelCheckpoint

from morsr.adapters import MoRConfig
from morsr.data import RealESRGANDataModule
from morsr.errors import TrainingError
from morsr.training.callbacks import AdapterEMA, RunSafety
from morsr.training.checkpoint_io import AtomicCheckpointIO, card_path

# Noise on the logits to the end, so that a resumed run has to draw the same.
NOISY = MoRConfig.from_dict({**twins.ADAPTERS.to_dict(), "logit_noise_until": 2.0})


class Stop(L.Callback):
    """Sends a signal in the middle of a step, after the generator has moved and before the others have."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step and optimizer is pl_module.phase.networks[1].optimizer:
            os.kill(os.getpid(), self.number)


def run(base: Path, folder: Path, *, stop: Stop | None = None, ckpt: Path | None = None) -> tuple[Any, Any]:
    """Four steps on synthetic photographs, three to an epoch, with all losses and an average."""
    module = twins.build(base, loss=twins.ALL_LOSSES, adapters=NOISY, schedule="cosine", warmup=2, calibration_images=2)
    data = RealESRGANDataModule(
        train=(), test=(), dead_leaves=1.0, batch_size=2, crop_size=32, samples_per_epoch=6, num_workers=0
    )
    keep = ModelCheckpoint(
        dirpath=folder, filename="at-{step}", every_n_train_steps=4, save_last=True, save_on_exception=True
    )
    callbacks = [AdapterEMA(decay=0.9), *([stop] if stop else []), RunSafety(config={"max_steps": 4}), keep]
    trainer = twins.fit(module, folder, 4, ckpt=ckpt, callbacks=callbacks, data=data)
    return module, trainer


@pytest.fixture(scope="module")
def straight(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A run that nobody stopped: its module, trainer and folder."""
    folder = tmp_path_factory.mktemp("straight")
    return *run(small_base, folder), folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_exactly(number: int, straight: Any, small_base: Path, tmp_path: Path) -> None:
    whole, trainer, _ = straight
    with pytest.raises(SystemExit):
        run(small_base, tmp_path / "half", stop=Stop(2, number))
    found = sorted((tmp_path / "half").glob("at-*.ckpt")) or sorted((tmp_path / "half").glob("*.ckpt"))
    assert found, "the signal left a checkpoint"
    checkpoint = torch.load(found[0], weights_only=True)
    assert checkpoint["global_step"] == 2, "the step in which the signal came was finished"
    resumed, again = run(small_base, tmp_path / "resumed", ckpt=found[0])
    assert again.global_step == trainer.global_step == 4
    ours, theirs = dict(resumed.named_parameters()), dict(whole.named_parameters())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
    for one, other in zip(resumed.phase.networks, whole.phase.networks, strict=True):
        assert one.scheduler.last_epoch == other.scheduler.last_epoch
        for key, state in other.optimizer.state_dict()["state"].items():
            for field, value in state.items():
                torch.testing.assert_close(
                    one.optimizer.state_dict()["state"][key][field], value, rtol=0, atol=0, msg=f"{one.name} {field}"
                )
    averages = [next(c for c in t.callbacks if isinstance(c, AdapterEMA)).state_dict() for t in (again, trainer)]
    assert averages[0]["updates"] == averages[1]["updates"] == 4
    for name, value in averages[1]["average"].items():
        torch.testing.assert_close(averages[0]["average"][name], value, rtol=0, atol=0, msg=name)
    assert not any(".score." in name for name in averages[1]["average"]), "the average is of the generator alone"


def test_each_checkpoint_has_a_card_that_says_what_run_it_is_from(straight: Any) -> None:
    (checkpoint,) = straight[2].glob("last.ckpt")
    card = json.loads(card_path(checkpoint).read_text())
    assert card["step"] == 4
    assert card["config"] == {"max_steps": 4}
    assert card["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert card["hardware"]["cores"] == os.cpu_count()
    assert card["data"]["train"]["synthetic"] == 1.0
    assert card["data"]["recipe"]
    assert {"seed", "commit", "precision"} <= set(card)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = AtomicCheckpointIO(lambda checkpoint: {"step": checkpoint["step"]})
    path = tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"step": 1, "x": torch.zeros(3)}, path)

    def full(checkpoint: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"last\.ckpt: .*No space left"):
        io.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["step"] == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.card.json", "last.ckpt"]
    io.remove_checkpoint(path)
    assert not list(path.parent.iterdir())
