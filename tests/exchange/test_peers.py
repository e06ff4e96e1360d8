"""Peers' files become adapters: every key accounted for, true shapes, and the same image as peft's own forward."""

import re
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from morsr.adapters import active_adapters, read_adapters_header
from morsr.cli import main
from morsr.errors import WeightsError
from morsr.models.bases.loading import ARCHITECTURES
from morsr.models.exchange.peers import read_osediff, read_pisasr, save_peer
from morsr.models.generator import OneStepConfig
from morsr.models.loading import load_generator
from morsr.restoring import Restorer


def networks(base: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    return (
        UNet2DConditionModel.from_pretrained(base, subfolder="unet"),
        AutoencoderKL.from_pretrained(base, subfolder="vae"),
    )


def sd21() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    with torch.device("meta"):
        _, shapes = ARCHITECTURES["sd21"]
        return UNet2DConditionModel(**shapes.network), AutoencoderKL(**shapes.vae)


def reference(unet: Any, vae: Any, base: Path, lr: Tensor, *, timestep: int, x0: Any) -> Tensor:
    """The peers' path with diffusers and peft alone: enlarge, encode, one UNet call, x0, decode."""
    prompt = load_file(base / "prompt_embeddings.safetensors")["clean"]
    factor = vae.config.scaling_factor
    with torch.no_grad():
        enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1) * 2 - 1  # sides fit the grid
        latents = vae.encode(enlarged).latent_dist.mean * factor
        prediction = unet(latents, torch.tensor([timestep]), encoder_hidden_states=prompt).sample
        return vae.decode(x0(latents, prediction) / factor).sample / 2 + 0.5


def restored(path: Path, base: Path, lr: Tensor, **settings: Any) -> Tensor:
    restorer = Restorer(load_generator(path, base=base), device="cpu")
    return restorer(lr, color="none", **settings)


def test_osediff_gives_the_image_that_peft_gives(kl_base, tmp_path):
    lr = torch.rand(1, 3, 8, 12)
    unet, vae = networks(kl_base)
    file = published.write(tmp_path / "osediff.pkl", published.osediff(unet, vae))
    path = save_peer(tmp_path / "o.safetensors", read_osediff(file), base=kl_base)
    alpha = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).prod().item()
    unet.set_adapter(["default_encoder", "default_decoder", "default_others"])
    expected = reference(
        unet, vae, kl_base, lr, timestep=999, x0=lambda z, eps: (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    )
    got = restored(path, kl_base, lr)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected.clamp(0, 1), atol=2e-4, rtol=0)
    model = load_generator(path, base=kl_base)
    with active_adapters(model.base, None):
        assert (got - Restorer(model, device="cpu")(lr, color="none")).abs().max() > 0.01


def test_pisasr_gives_the_images_that_peft_gives(kl_base, tmp_path):
    lr = torch.rand(1, 3, 8, 12)
    unet, vae = networks(kl_base)
    file = published.write(tmp_path / "pisa_sr.pkl", published.pisasr(unet, ranks=(4, 3)))
    path = save_peer(tmp_path / "p.safetensors", read_pisasr(file), base=kl_base)
    pixel = [f"default_{group}_pix" for group in ("encoder", "decoder", "others")]
    semantic = [name.replace("_pix", "_sem") for name in pixel]

    def peft(weights: dict[str, float]) -> Tensor:
        unet.set_adapters(list(weights), list(weights.values()))
        return reference(unet, vae, kl_base, lr, timestep=1, x0=lambda z, eps: z - eps).clamp(0, 1)

    both, alone = peft(dict.fromkeys(pixel + semantic, 1.0)), peft(dict.fromkeys(pixel, 1.0))
    assert (both - alone).abs().max() > 0.01
    torch.testing.assert_close(restored(path, kl_base, lr), both, atol=1e-4, rtol=0)
    torch.testing.assert_close(restored(path, kl_base, lr, strength=0.0), alone, atol=1e-4, rtol=0)
    half = peft({**dict.fromkeys(pixel, 1.0), **dict.fromkeys(semantic, 0.5)})
    torch.testing.assert_close(restored(path, kl_base, lr, strength=0.5), half, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_true_shapes_of_osediff(tmp_path, capsys):
    """No base is at hand: the file is made from the known architecture alone."""
    unet, vae = sd21()
    content = published.osediff(unet, vae)
    assert len(content["state_dict_unet"]) == 2 * 258 + 2
    assert len(content["state_dict_vae"]) == 2 * 32
    published.write(tmp_path / "osediff.pkl", content)
    assert main(["import", "osediff", "osediff.pkl", "osediff.safetensors"]) == 0
    header = read_adapters_header("osediff.safetensors")
    assert header["extra"]["one_step"] == OneStepConfig(timestep=999, parametrization="epsilon").to_dict()
    assert header["extra"]["base"] == "sd21"
    assert len(header["layers"]) == 258 + 32
    assert header["saved"] == ["unet.conv_in"]
    assert "4 shared ranks on 290 layers" in capsys.readouterr().err


@pytest.mark.slow
def test_true_shapes_of_pisasr(tmp_path):
    content = published.pisasr(sd21()[0])
    assert len(content["state_dict_unet"]) == 4 * 258
    published.write(tmp_path / "pisa_sr.pkl", content)
    assert main(["import", "pisasr", "pisa_sr.pkl", "pisa.safetensors"]) == 0
    header = read_adapters_header("pisa.safetensors")
    assert header["extra"]["one_step"] == OneStepConfig(timestep=1, parametrization="residual").to_dict()
    assert (header["config"].num_shared, header["config"].num_ranks, len(header["layers"])) == (4, 8, 258)


def without(key: str, inside: str | None = None) -> Any:
    def change(content: dict[str, Any]) -> None:
        del (content[inside] if inside else content)[key]

    return change


def setting(key: str, value: Any, inside: str | None = None) -> Any:
    def change(content: dict[str, Any]) -> None:
        (content[inside] if inside else content)[key] = value

    return change


def without_layer(content: dict[str, Any]) -> None:
    for part in "AB":
        del content["state_dict_unet"][FIRST.replace("lora_A", f"lora_{part}")]


FIRST = "down_blocks.0.resnets.0.conv1.lora_A.default_encoder.weight"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (without("rank_unet"), "rank_unet"),
        (without(FIRST, "state_dict_unet"), "unet.down_blocks.0.resnets.0.conv1"),
        (without_layer, "unet.down_blocks.0.resnets.0.conv1"),
        (setting("conv_out.weight", torch.zeros(1), "state_dict_unet"), "conv_out.weight"),
        (setting(FIRST, torch.zeros(5, 8, 3, 3), "state_dict_unet"), FIRST),
        (setting(FIRST, torch.zeros(4, 9, 3, 3), "state_dict_unet"), "conv1"),
        (setting(FIRST, torch.full((4, 8, 3, 3), torch.nan), "state_dict_unet"), "NaN"),
        (setting("conv_in.base_layer.weight", torch.zeros(8, 5, 3, 3), "state_dict_unet"), "unet.conv_in.weight"),
    ],
)
def test_files_of_another_layout_are_refused(change, name, kl_base, tmp_path):
    content = published.osediff(*networks(kl_base))
    change(content)
    file = published.write(tmp_path / "osediff.pkl", content)
    with pytest.raises(WeightsError, match=re.escape(name)):
        save_peer(tmp_path / "o.safetensors", read_osediff(file), base=kl_base)
    assert not (tmp_path / "o.safetensors").exists()


def test_files_that_are_something_else(kl_base, tmp_path):
    unet, _ = networks(kl_base)
    other = published.write(tmp_path / "pisa_sr.pkl", published.pisasr(unet))
    with pytest.raises(WeightsError, match="rank_unet"):
        read_osediff(other)
    with pytest.raises(WeightsError, match="another base"):
        save_peer(tmp_path / "p.safetensors", read_pisasr(other))
    executed = tmp_path / "executed"
    pickled = b"\x80\x02cposix\nsystem\n(S'touch " + str(executed).encode() + b"'\ntR."
    for name, damaged in (
        ("photo.png", b"\x89PNG\r\n"), ("empty.pkl", b""), ("cut.pkl", other.read_bytes()[:5000]), ("bad.pkl", pickled),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(WeightsError, match=name):
            read_pisasr(tmp_path / name)
    assert not executed.exists()
    with pytest.raises(WeightsError, match=r"absent\.pkl"):
        read_pisasr(tmp_path / "absent.pkl")


def test_a_base_without_the_prompt_is_refused(kl_base, tmp_path):
    file = published.write(tmp_path / "pisa_sr.pkl", published.pisasr(networks(kl_base)[0]))
    path = save_peer(tmp_path / "p.safetensors", read_pisasr(file), base=kl_base, prompt="a cat")
    with pytest.raises(WeightsError, match="no text_encoder and no tokenizer"):
        load_generator(path)
