"""A run that was stopped resumes as if it never had been: for every LightningModule here, bit for bit."""

import functools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import training_twins as twins
from lightning.pytorch.callbacks import ModelCheckpoint

from morsr.data import RealESRGANDataModule
from morsr.errors import class_at
from morsr.models.bases import load_base
from morsr.training.base_phases import AutoencoderTraining, DiffusionTraining
from morsr.training.callbacks import AdapterEMA, StopBetweenSteps
from morsr.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from morsr.training.estimator import LearnedEstimatorTraining

# Noise on the logits to the end, so that a resumed run has to draw the same.
NOISY = replace(twins.ADAPTERS, logit_noise_until=2.0)


def one_step(base: Path, out: Path) -> L.LightningModule:
    return twins.build(base, loss=twins.ALL_LOSSES, adapters=NOISY, schedule="cosine", warmup=2, calibration_images=2)


def whole(base: Path, out: Path) -> L.LightningModule:
    """The module that trained the shipped model."""
    kind = class_at("experiments.tiny.whole.WholeModel", "whole")
    return twins.build(base, kind, loss={"l2": 1.0}, adapters=NOISY, calibration_images=2, base_lr=1e-3, plain_every=2)


def autoencoder(base: Path, out: Path) -> L.LightningModule:
    unet, vae = (json.loads((base / part / "config.json").read_text()) for part in ("unet", "vae"))
    vae = {key: value for key, value in vae.items() if not key.startswith("_") and key != "block_out_channels"}
    unet = {key: value for key, value in unet.items() if not key.startswith("_")}
    return AutoencoderTraining(unet=unet, vae=vae, out=str(out), warmup=2)


def diffusion(base: Path, out: Path) -> L.LightningModule:
    return DiffusionTraining(base=str(base), out=str(out), warmup=2)


def estimator(base: Path, out: Path) -> L.LightningModule:
    return LearnedEstimatorTraining(out=f"{out}.safetensors", hidden=8, replay=2, pool=5, fill=0.25, warmup=0)


MODULES: dict[str, Callable[[Path, Path], L.LightningModule]] = {
    made.__name__: made for made in (one_step, whole, autoencoder, diffusion, estimator)
}


def test_an_autoencoder_trains_in_bfloat16(small_base, tmp_path):
    module = autoencoder(small_base, tmp_path / "out")
    module.configure_model()
    with torch.autocast("cpu", torch.bfloat16):
        module.training_step({"hr": torch.rand(1, 3, 32, 32)}, 0)
    assert module.latent_square.dtype == torch.float32


def test_the_scaling_factor_belongs_to_the_raw_latents(small_base, tmp_path):
    module = autoencoder(small_base, tmp_path / "out")
    module.shapes["vae"]["scaling_factor"] = 0.5
    module.configure_model()
    module.latent_square.fill_(4.0)  # of latents that were multiplied by 0.5
    module.write()
    assert load_base(tmp_path / "out").scaling_factor == 0.25


class Stop(L.Callback):
    """Sends a signal in the middle of the second step."""

    def __init__(self, number: int) -> None:
        self.number, self.batch = number, -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.batch == 1:
            self.batch = -1
            os.kill(os.getpid(), self.number)


def run(name: str, base: Path, folder: Path, *, stop: int | None = None, ckpt: Path | None = None) -> tuple[Any, Any]:
    """Four steps on synthetic photographs, three to an epoch, with an average of the weights."""
    torch.manual_seed(0)
    module = MODULES[name](base, folder / "out")
    size = 64 if name == "estimator" else 32
    data = RealESRGANDataModule(
        train=(), test=(), dead_leaves=1.0, batch_size=2, crop_size=size, samples_per_epoch=6, num_workers=0
    )
    keep = ModelCheckpoint(dirpath=folder, filename="at-{step}", every_n_train_steps=4, save_last=True)
    callbacks = [AdapterEMA(decay=0.9), *([Stop(stop)] if stop else []), StopBetweenSteps(), keep]
    trainer = twins.fit(module, folder, 4, ckpt=ckpt, callbacks=callbacks, data=data, plugins=[AtomicCheckpointIO()])  # type: ignore[arg-type]
    return module, trainer


@pytest.fixture(scope="module")
def straight(small_base, tmp_path_factory):
    """A run of a module that nobody stopped, and its folder; made once for all signals."""

    @functools.cache
    def made(name: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(name)
        return run(name, small_base, folder)[0], folder

    return made


@pytest.mark.parametrize(("name", "number"), zip(MODULES, cycle([signal.SIGTERM, signal.SIGINT])))
def test_a_stopped_run_resumes_exactly(name, number, straight, small_base, tmp_path, repo_root, monkeypatch):
    monkeypatch.syspath_prepend(repo_root)
    expected, folder = straight(name)
    with pytest.raises(SystemExit):
        run(name, small_base, tmp_path / "half", stop=number)
    (saved,) = (tmp_path / "half").glob("at-*.ckpt")
    assert read_checkpoint(saved)["global_step"] == 2, "the step in which the signal came was finished"
    torch.manual_seed(99)
    resumed, again = run(name, small_base, tmp_path / "resumed", ckpt=saved)
    assert again.global_step == 4
    torch.testing.assert_close(resumed.state_dict(), expected.state_dict(), rtol=0, atol=0)
    ends = [read_checkpoint(place / "last.ckpt") for place in (folder, tmp_path / "resumed")]
    states = [[one["state"] for one in end["optimizer_states"]] for end in ends]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert ends[1]["lr_schedulers"] == ends[0]["lr_schedulers"]
    averages = [end["callbacks"]["AdapterEMA"] for end in ends]
    assert averages[0]["updates"] == 5
    torch.testing.assert_close(averages[1], averages[0], rtol=0, atol=0)
    assert not any(".score." in key for key in averages[0]["average"]), "the average is of the generator alone"
