"""The module under Lightning, on a small base: what is trained, saved, resumed and refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import training_twins as twins
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from training_twins import ADAPTERS, build
from training_twins import batch as random_batch

from morsr.adapters import MoRConfig, read_adapters_header
from morsr.errors import ConfigError, WeightsError
from morsr.models.generator import OneStepConfig
from morsr.models.loading import find_adapters, load_generator
from morsr.training.adapter_state import newest_adapters
from morsr.training.callbacks import AdapterEMA
from morsr.training.module import OneStepSRModule

CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "tiny/mor.yaml"


def fit(module: OneStepSRModule, folder: Path, steps: int, *, ckpt: Path | None = None, save_at: int = 0) -> L.Trainer:
    keep = ModelCheckpoint(dirpath=folder, filename="at-{step}", every_n_train_steps=save_at, save_top_k=-1)
    return twins.fit(module, folder, steps, ckpt=ckpt, callbacks=[keep] if save_at else None)


def test_frozen_weights_stay_bit_equal_and_adapters_move(small_base: Path, tmp_path: Path) -> None:
    module = build(small_base)
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    fit(module, tmp_path, 3)
    moved = 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            moved += not torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, before[name], atol=0, rtol=0, msg=name)
    assert moved > 20


def test_the_router_learns_from_the_second_step_on(small_base: Path) -> None:
    # With the up projections at zero the gates have no effect, so the task tells the router nothing at step 0.
    module = build(small_base, adapters=MoRConfig.from_dict({**ADAPTERS.to_dict(), "balance_alpha": 0.0}))
    module.train()
    batch = random_batch()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = module.loss(module.generator(batch["lr"]).sr, batch["hr"])["total"]
        loss.backward()
        sizes.append(module.generator.adapters.router.weight.grad.abs().sum().item())
        optimizer.step()
    assert sizes[0] == 0
    assert sizes[1] > 0


def test_the_router_is_standardised_once_and_saved(small_base: Path, tmp_path: Path) -> None:
    module = build(small_base)
    assert not module.generator.adapters.router.standardized
    fit(module, tmp_path, 1)
    mean = module.generator.adapters.router.mean.clone()
    assert module.generator.adapters.router.standardized
    module.save_adapters(tmp_path / "adapters.safetensors")
    loaded = load_generator(tmp_path / "adapters.safetensors")
    torch.testing.assert_close(loaded.adapters.router.mean, mean, atol=0, rtol=0)


def test_a_resumed_run_equals_a_straight_one(small_base: Path, tmp_path: Path) -> None:
    straight = build(small_base)
    fit(straight, tmp_path / "straight", 6, save_at=3)
    resumed = build(small_base)
    fit(resumed, tmp_path / "resumed", 6, ckpt=tmp_path / "straight" / "at-step=3.ckpt")
    for name, parameter in straight.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                dict(resumed.named_parameters())[name], parameter, atol=1e-6, rtol=1e-5, msg=name
            )


def test_a_checkpoint_holds_adapters_and_no_base(small_base: Path, tmp_path: Path) -> None:
    fit(build(small_base), tmp_path, 2, save_at=2)
    checkpoint = torch.load(tmp_path / "at-step=2.ckpt", weights_only=True)
    keys = checkpoint["state_dict"]
    assert keys
    assert not any("base_layer" in key or "vae.decoder" in key or "norm" in key for key in keys)
    assert checkpoint["morsr"]["base_id"] == "morsr/test"


def test_checkpoint_and_adapters_file_give_the_same_generator(small_base: Path, tmp_path: Path) -> None:
    module = build(small_base)
    fit(module, tmp_path, 2, save_at=2)
    module.save_adapters(tmp_path / "adapters.safetensors")
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = module.eval().generator(lr).sr
        for file in ("at-step=2.ckpt", "adapters.safetensors"):
            torch.testing.assert_close(load_generator(tmp_path / file)(lr).sr, expected, atol=1e-6, rtol=0, msg=file)


def test_a_checkpoint_of_averaged_weights_restores_with_the_average(small_base: Path, tmp_path: Path) -> None:
    module, average = build(small_base), AdapterEMA(decay=0.9, warmup=0)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="kept", every_n_train_steps=4)
    twins.fit(module, tmp_path, 4, callbacks=[average, keep])
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        raw = module.eval().generator(lr).sr
        with average.averaged(module):
            expected = module.generator(lr).sr
        found = load_generator(tmp_path / "kept.ckpt")(lr).sr
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-6)


def test_adapters_of_another_timestep_or_estimator_are_refused(small_base: Path, tmp_path: Path) -> None:
    build(small_base).save_adapters(tmp_path / "runs" / "version_0" / "adapters.safetensors")
    file = tmp_path / "runs" / "version_0" / "adapters.safetensors"
    later = OneStepConfig(timestep=400, scale_input=True)
    with pytest.raises(WeightsError, match="timestep 150, not 400"):
        build(small_base, one_step=later, weights=str(file))
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path / "runs" / "version_1"), default_root_dir=".")
    assert newest_adapters(trainer, build(small_base).generator) == file
    assert newest_adapters(trainer, build(small_base, one_step=later).generator) is None
    assert newest_adapters(trainer, build(small_base, estimator="learned").generator) is None


def test_a_run_may_end_by_the_clock(small_base: Path, tmp_path: Path) -> None:
    module = build(small_base, schedule="constant")
    trainer = twins.fit(module, tmp_path, -1, max_time={"seconds": 1})
    assert trainer.global_step > 0
    with pytest.raises(ConfigError, match="cosine schedule needs a number of steps"):
        twins.fit(build(small_base, schedule="cosine"), tmp_path, -1, max_time={"seconds": 1})


def test_adapters_say_how_they_are_run(small_base: Path, tmp_path: Path) -> None:
    build(small_base).save_adapters(tmp_path / "a.safetensors")
    header = read_adapters_header(tmp_path / "a.safetensors")
    assert header["base_id"] == "morsr/test"
    assert header["extra"]["one_step"]["timestep"] == 150
    assert header["extra"]["estimator"]["kind"] == "frequency"


def test_a_checkpoint_of_other_adapters_is_refused(small_base: Path, tmp_path: Path) -> None:
    fit(build(small_base), tmp_path, 1, save_at=1)
    other = build(small_base, adapters=MoRConfig.from_dict({**ADAPTERS.to_dict(), "targets": ["sd_unet@unet"]}))
    with pytest.raises(WeightsError, match="does not fit"):
        fit(other, tmp_path, 2, ckpt=tmp_path / "at-step=1.ckpt")


def test_half_a_checkpoint_is_refused_by_name(small_base: Path, tmp_path: Path) -> None:
    fit(build(small_base), tmp_path, 1, save_at=1)
    file = tmp_path / "at-step=1.ckpt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"at-step=1\.ckpt"):
        load_generator(file)


@pytest.mark.parametrize("own", [False, True], ids=["none", "given"])
def test_adapters_bring_the_decoder_they_were_trained_with(own: bool, small_base: Path, tmp_path: Path) -> None:
    """Else `make eval` would decode the shipped perceptual adapters with a decoder that they do not know."""
    from morsr.models.bases import load_base, save_network

    for name, factor in (("theirs", 1.5), ("ours", 2.0)):
        network = load_base(small_base).vae.requires_grad_(False)
        network.decoder.layers[0].weight.mul_(factor)
        (tmp_path / name).mkdir()
        save_network(tmp_path / name, network)
    file = tmp_path / "a.safetensors"
    build(small_base, decoder=str(tmp_path / "theirs")).save_adapters(file)
    module = build(small_base, decoder=str(tmp_path / "ours") if own else None)
    module.load_adapters(file)
    expected = load_generator(file, decoder=tmp_path / "ours" if own else None)
    batch = random_batch()
    with torch.no_grad():
        torch.testing.assert_close(module.eval().generator(batch["lr"]).sr, expected(batch["lr"]).sr)
    assert not any(p.requires_grad for p in module.generator.base.decoder.parameters())
    module.save_adapters(tmp_path / "again.safetensors")
    saved = read_adapters_header(tmp_path / "again.safetensors")["extra"]["decoder"]
    assert saved == str(tmp_path / ("ours" if own else "theirs"))
    start = build(small_base, decoder=str(tmp_path / "ours") if own else None, start_from=str(file))
    with warnings.catch_warnings(record=True) as caught:
        fit(start, tmp_path, 1)
    assert any("--model.decoder=" in str(warning.message) for warning in caught) != own


def test_weights_are_named_as_for_the_restorer(tmp_path: Path) -> None:
    settings = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]
    adapters = MoRConfig.from_dict(settings["adapters"])
    one_step = OneStepConfig(**settings["one_step"])
    module = OneStepSRModule(adapters=adapters, one_step=one_step, weights="tiny")
    assert any(up.abs().sum() > 0 for name, up in module.named_parameters() if name.endswith("lora_B"))
    with pytest.raises(WeightsError, match="no such adapters file or folder, and no shipped preset"):
        OneStepSRModule(adapters=adapters, weights=str(tmp_path / "absent.safetensors"))


def test_without_weights_the_set_shipped_for_the_base_is_taken(small_base: Path, tmp_path: Path) -> None:
    nowhere: Any = SimpleNamespace(log_dir=str(tmp_path / "version_0"), default_root_dir=".")
    file = find_adapters("tiny-fidelity")
    module = build(
        file.parent, adapters=read_adapters_header(file)["config"],
        one_step=OneStepConfig(timestep=200, scale_input=True),
    )  # fmt: skip
    module.trainer = nowhere
    module._find_weights()
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(module.eval()(images), load_generator(file).eval()(images).sr.clamp(0, 1))
    module = build(small_base)
    module.trainer = nowhere
    with pytest.raises(WeightsError, match=r"train it first, or name some by model\.weights"):
        module._find_weights()
