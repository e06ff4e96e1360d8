"""Parameters of the base that are trained whole beside the adapters: which move, how they are kept, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training_twins import ALL_LOSSES, build, fit

from morsr.adapters import MoRConfig, inject, read_adapters_header, train_whole
from morsr.errors import ConfigError
from morsr.models.backbone import load_backbone, save_network
from morsr.models.loading import load_generator

DECODER = [r"vae\.decoder\..*"]


def test_the_named_parameters_learn_at_their_own_rate_and_the_rest_of_the_base_stays(
    small_base: Path, tmp_path: Path
) -> None:
    module = build(small_base, whole=DECODER, whole_lr_scale=0.5, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in module.generator.backbone.named_parameters()}
    trainer = fit(module, tmp_path, 2)
    group = {group["name"]: group for group in trainer.optimizers[0].param_groups}["whole"]
    assert (group["initial_lr"], group["weight_decay"]) == (5e-3, 0.0)
    for name, parameter in module.generator.backbone.named_parameters():
        decoder = name.startswith("vae.decoder.")
        assert parameter.requires_grad == (decoder or ".sets." in name or ".contexts." in name), name
        if decoder or not parameter.requires_grad:
            assert torch.equal(parameter, before[name]) != decoder, name


def test_they_are_kept_in_every_file_and_resumed(small_base: Path, tmp_path: Path) -> None:
    straight = build(small_base, whole=DECODER)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="at-{step}", every_n_train_steps=3, save_top_k=-1)
    fit(straight, tmp_path, 6, callbacks=[keep])
    straight.save_adapters(tmp_path / "adapters.safetensors")
    assert "vae.decoder.layers.0.weight" in read_adapters_header(tmp_path / "adapters.safetensors")["whole"]
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = straight.eval().generator(lr).sr
        for file in ("at-step=6.ckpt", "adapters.safetensors"):
            torch.testing.assert_close(load_generator(tmp_path / file)(lr).sr, expected, atol=1e-6, rtol=0, msg=file)
    resumed = build(small_base, whole=DECODER)
    fit(resumed, tmp_path / "resumed", 6, ckpt=tmp_path / "at-step=3.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(resumed.eval().generator(lr).sr, expected, atol=1e-6, rtol=1e-5)


def test_adapters_without_them_are_a_start(small_base: Path, tmp_path: Path) -> None:
    build(small_base).save_adapters(tmp_path / "plain.safetensors")
    module = build(small_base, whole=DECODER, start_from=str(tmp_path / "plain.safetensors"))
    fit(module, tmp_path, 1)
    module.save_adapters(tmp_path / "whole.safetensors")
    assert len(read_adapters_header(tmp_path / "whole.safetensors")["whole"]) == len(
        list(module.generator.backbone.vae.decoder.parameters())
    )


def test_the_weight_of_an_adapted_layer_gets_the_gradient_of_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.SiLU(), torch.nn.Linear(5, 4))
    images = torch.rand(2, 3, 5, 5)
    plain(images).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    inject(plain, MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=["0", "2"]), condition_dim=2)
    plain[0].shared.contexts["generator"].condition = torch.rand(2, 2)
    chosen = train_whole(plain, [r"0\.weight", r"2\..*"])
    assert [tuple(parameter.shape) for parameter in chosen] == [(6, 3, 3, 3), (4, 5), (4,)]
    for parameter in chosen:
        parameter.grad = None
    plain(images).square().sum().backward()  # ranks start with no effect
    torch.testing.assert_close(chosen[0].grad, expected["0.weight"])
    torch.testing.assert_close(chosen[1].grad, expected["2.weight"])
    assert plain[0].base_layer.bias.requires_grad is False


def test_what_cannot_be_trained_whole_is_refused(small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vae\\\\.encoders' fits no parameter of the base"):
        build(small_base, whole=[r"vae\.encoders"])
    with pytest.raises(
        ConfigError, match=r"unet\.conv_in\.weight belongs to the frozen base, by which vsd, gan, features judge"
    ):
        build(small_base, whole=[r"unet\.conv_in\..*"], loss=ALL_LOSSES)
    assert build(small_base, whole=DECODER, loss=ALL_LOSSES).objective.whole
    with pytest.raises(ConfigError, match=r"stored as torch.bfloat16; training it needs base_dtype float32"):
        build(small_base, whole=DECODER, base_dtype="bfloat16")
    with pytest.raises(ConfigError, match="whole_lr_scale above 0"):
        build(small_base, whole=DECODER, whole_lr_scale=0.0)


def test_a_decoder_that_weights_bring_is_refused_like_a_given_one(small_base: Path, tmp_path: Path) -> None:
    """It decodes in place of the base's, whose parameters would be trained without ever being used."""
    network = load_backbone(small_base).vae.requires_grad_(False)
    (tmp_path / "decoder").mkdir()
    save_network(tmp_path / "decoder", network)
    other = build(small_base, decoder=str(tmp_path / "decoder"))
    other.save_adapters(tmp_path / "a.safetensors")
    told = "whole: the decoder of this run is a folder beside the base"
    with pytest.raises(ConfigError, match=told):
        build(small_base, whole=DECODER, decoder=str(tmp_path / "decoder"))
    with pytest.raises(ConfigError, match=told):
        build(small_base, whole=DECODER, weights=str(tmp_path / "a.safetensors"))
    later = build(small_base, whole=DECODER)
    later.load_adapters(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=told):
        fit(later, tmp_path, 1)
    made: dict[str, Any] = {"state_dict": other.state_dict()}
    other.on_save_checkpoint(made)
    with pytest.raises(ConfigError, match=told):
        build(small_base, whole=DECODER).on_load_checkpoint(made)
    assert build(small_base, whole=[r"vae\.encoder\..*"], weights=str(tmp_path / "a.safetensors")).objective.whole


def test_what_adapters_bring_of_the_judging_base_is_told(
    small_base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source = build(small_base)
    source.generator.context.whole = ("unet.conv_in.bias",)
    source.save_adapters(tmp_path / "whole.safetensors")
    for loss, told in (({"l2": 1.0, "csd": 1.0}, True), ({"l2": 1.0}, False)):
        recwarn.clear()
        fit(build(small_base, loss=loss, start_from=str(tmp_path / "whole.safetensors")), tmp_path, 1)
        found = [str(w.message) for w in recwarn if "judge by the changed one" in str(w.message)]
        assert bool(found) == told
        assert all("unet.conv_in.bias belongs to the frozen base, by which csd judge" in text for text in found)
