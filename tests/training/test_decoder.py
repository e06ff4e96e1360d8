"""The adversarial phase of a decoder: what moves, what stays, and what comes out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import morsr.training.base_phases
from morsr.errors import ConfigError
from morsr.models.bases import load_base
from morsr.models.discriminator import DiscriminatorConfig
from morsr.models.losses import Weight
from morsr.training.base_phases import DecoderTraining, some_enlarged


def batches(count: int) -> DataLoader[dict[str, Tensor]]:
    torch.manual_seed(0)
    return DataLoader([{"hr": torch.rand(3, 32, 32)} for _ in range(2 * count)], batch_size=2)


def training(base: Path, out: Path, **settings: Any) -> DecoderTraining:
    discriminator = DiscriminatorConfig(sees="image", width=4, lr=1e-3)
    return DecoderTraining(base=str(base), out=str(out), **{"discriminator": discriminator, "warmup": 0, **settings})


def fit(module: DecoderTraining, steps: int) -> DecoderTraining:
    trainer = L.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, batches(steps))
    return module


def test_the_decoder_and_the_discriminator_move_and_nothing_else(small_base: Path, tmp_path: Path) -> None:
    module = training(small_base, tmp_path / "decoder")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, 2)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"base", "discriminator"}
    assert all(name.startswith(("base.vae.decoder.", "discriminator.")) for name in moved)
    assert {name for name in before if name.startswith("base.vae.decoder.") and name.endswith("weight")} <= moved


def test_the_result_is_a_decoder_of_the_same_base(small_base: Path, tmp_path: Path) -> None:
    module = fit(training(small_base, tmp_path / "decoder"), 2)
    whole = load_base(small_base, decoder=tmp_path / "decoder")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = whole.encode(image)
    torch.testing.assert_close(latents, load_base(small_base).encode(image), atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(whole.decode(latents), module.base.decode(latents))
        assert (whole.decode(latents) - load_base(small_base).decode(latents)).abs().max() > 1e-5


def test_the_adversarial_loss_does_not_teach_the_discriminator_to_be_fooled(small_base: Path, tmp_path: Path) -> None:
    """Its heads follow the hinge loss alone: with the decoder held still they come to prefer the images."""
    module = training(small_base, tmp_path / "decoder", lr=1e-12, gan=Weight(weight=10.0), enlarged_share=0.0)
    fit(module, 30)
    images = torch.cat([batch["hr"] for batch in batches(4)])
    with torch.no_grad():
        decoded = module.base.decode(module.base.encode(images * 2 - 1)) / 2 + 0.5
        real, fake = (torch.stack([v.mean() for v in module.discriminator(x)]) for x in (images, decoded))
    assert (real > fake + 0.1).all()


def test_without_a_sharp_image_there_is_nothing_to_judge(small_base: Path, tmp_path: Path) -> None:
    module = training(small_base, tmp_path / "decoder", enlarged_share=1.0)
    before = [parameter.clone() for parameter in module.discriminator.parameters()]
    fit(module, 1)
    for old, new in zip(before, module.discriminator.parameters(), strict=True):
        torch.testing.assert_close(old, new, atol=0, rtol=0)


def test_some_are_enlarged_and_the_others_are_left() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16)
    seen, chosen = some_enlarged(images, 0.5)
    assert 16 < int(chosen.sum()) < 48
    torch.testing.assert_close(seen[~chosen], images[~chosen], atol=0, rtol=0)
    assert seen[chosen].diff(dim=-1).abs().mean() < 0.3 * images[chosen].diff(dim=-1).abs().mean()


def test_what_cannot_be_trained_so_is_refused(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="expected image, got latents"):
        training(small_base, tmp_path, discriminator=DiscriminatorConfig(sees="latents"))
    with pytest.raises(ConfigError, match="at least 0"):
        training(small_base, tmp_path, gan=Weight(weight=-1.0))
    other = SimpleNamespace(vae=type("AutoencoderKL", (), {})())
    monkeypatch.setattr(morsr.training.base_phases, "load_base", lambda base: other)
    with pytest.raises(ConfigError, match="expected an AutoencoderTiny as its autoencoder, got AutoencoderKL"):
        training(small_base, tmp_path)
