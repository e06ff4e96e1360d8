"""Small twins of every family, saved by diffusers and read back: one table of bases, one list of properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from morsr.adapters import MoRConfig, active_adapters, adapter_parameters, merged
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.draws import Draws
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.losses import Losses
from morsr.models.saving import save_generator
from morsr.models.score_network import ScoreConfig, Teacher
from morsr.training.module import OneStepSRModule
from morsr.training.step import OneStepPhase

_VAE = {
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
_UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
_ADDED = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
}  # fmt: skip
_LATENTS = {"scaling_factor": 1.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
_DIFFUSION = ("DDPMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
_SD3 = {
    "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
    "out_channels": 4, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 6,
    "pos_embed_max_size": 16, "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip
_KLEIN = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "timestep_guidance_channels": 8, "axes_dims_rope": [2, 2, 2, 2], "guidance_embeds": False,
}  # fmt: skip
_FLOW = "FlowMatchEulerDiscreteScheduler"
# pipeline, network, its settings, autoencoder, its settings, scheduler, targets, pooled width, timestep
FAMILIES: dict[str, tuple[Any, ...]] = {
    "sd15": (
        "StableDiffusionPipeline", "UNet2DConditionModel", _UNET, "AutoencoderKL", {}, _DIFFUSION,
        ("sd_unet@unet", "sd_vae_encoder@vae"), 0, 999,
    ),
    "sdxl": (
        "StableDiffusionXLPipeline", "UNet2DConditionModel", {**_UNET, **_ADDED}, "AutoencoderKL", {}, _DIFFUSION,
        ("sd_unet@unet", "sd_vae_encoder@vae"), 6, 250,
    ),
    "sd3": (
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", _SD3, "AutoencoderKL", _LATENTS, (_FLOW, {"shift": 3.0}),
        ("sd3@transformer", "sd_vae_encoder@vae"), 6, 250,
    ),
    "flux2-klein": (
        "Flux2KleinPipeline", "Flux2Transformer2DModel", _KLEIN, "AutoencoderKLFlux2", {},
        (_FLOW, {"use_dynamic_shifting": True, "max_shift": 1.15}), ("flux2@transformer", "sd_vae_encoder@vae"), 0, 250,
    ),
}  # fmt: skip


def write_twin(folder: Path, family: str) -> None:
    """The small twin of a family, as diffusers saves it, with its embeddings cached."""
    import diffusers

    pipeline, network, settings, vae, latents, (scheduler, schedule), _, pooled, _ = FAMILIES[family]
    torch.manual_seed(0)
    place = "unet" if network.startswith("UNet") else "transformer"
    getattr(diffusers, network)(**settings).save_pretrained(folder / place)
    autoencoder = getattr(diffusers, vae)(latent_channels=4, **_VAE, **latents)
    if hasattr(autoencoder, "bn"):
        autoencoder.bn.running_mean.uniform_(-0.2, 0.2)
        autoencoder.bn.running_var.uniform_(0.5, 2)
    autoencoder.save_pretrained(folder / "vae")
    getattr(diffusers, scheduler)(**schedule).save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "is_distilled": family == "flux2-klein"}
    (folder / "model_index.json").write_text(json.dumps(index))
    prompts = {side: torch.randn(1, 3, 8) for side in ("clean", "degraded")}
    if pooled:
        prompts |= {f"{side}_pooled": torch.randn(1, pooled) for side in ("clean", "degraded")}
    save_file(prompts, folder / "prompt_embeddings.safetensors")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_twin(root / family, family)
    return root


def adapters(family: str) -> MoRConfig:
    return MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=FAMILIES[family][6])


def build(folder: Path, family: str, *, awake: bool = False, checkpointing: bool = False) -> OneStepGenerator:
    torch.manual_seed(1)
    generator = OneStepGenerator(
        load_base(folder), build_estimator("frequency"), adapters=adapters(family), checkpointing=checkpointing,
        one_step=OneStepConfig(timestep=FAMILIES[family][8]),
    ).eval()  # fmt: skip
    if awake:
        with torch.no_grad():
            for parameter in adapter_parameters(generator.base):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return generator


def images(count: int = 3) -> torch.Tensor:
    strength = torch.linspace(0.2, 1, count).view(-1, 1, 1, 1)
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * strength


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_one_step_inverts_its_own_noise_and_decodes_what_it_encodes(self, twins: Path, family: str) -> None:
        base = load_base(twins / family).eval()
        assert base.pipelines[0] == FAMILIES[family][0]
        with torch.no_grad():
            z0 = base.encode(torch.rand(2, 3, 16, 8) * 2 - 1)
            assert base.decode(z0).shape == (2, 3, 16, 8)
        t, noise = torch.tensor([3, 700]), torch.randn_like(z0)
        z_t = base.noised(z0, noise, t)
        torch.testing.assert_close(base.clean_from(z_t, base.target(z0, noise), t), z0.float(), atol=1e-4, rtol=1e-4)
        quiet = base.noised(z0, torch.zeros_like(z0), 300)
        torch.testing.assert_close(quiet, base.signal(300) * z0)

    def test_a_fresh_set_changes_nothing_and_a_trained_one_routes_each_image(self, twins: Path, family: str) -> None:
        generator, lr = build(twins / family, family), images()
        with torch.no_grad():
            fresh = generator(lr).sr
            with active_adapters(generator.base, None):
                torch.testing.assert_close(generator(lr).sr, fresh, atol=0, rtol=0)
            generator = build(twins / family, family, awake=True)
            together = generator(lr)
            assert not torch.allclose(together.sr, fresh, atol=1e-5)
            assert not torch.equal(together.routing.chosen[:, 0], together.routing.chosen[:, 2])
            apart = torch.cat([generator(one[None]).sr for one in lr])
            torch.testing.assert_close(together.sr, apart, atol=1e-3, rtol=0)
            alone = generator(lr[:1]).sr
            with merged(generator.base):
                torch.testing.assert_close(generator.decode(generator.denoise(generator.encode(
                    torch.nn.functional.interpolate(lr[:1], size=(16, 16), mode="bicubic").clamp(0, 1)))), alone,
                    atol=1e-3, rtol=0)  # fmt: skip

    def test_two_steps_of_every_loss_and_a_file_that_loads(self, twins: Path, family: str, tmp_path: Path) -> None:
        guidance = 1.0 if family == "flux2-klein" else 2.0
        module = OneStepSRModule(
            base=str(twins / family), adapters=adapters(family), lr=1e-2,
            one_step=OneStepConfig(timestep=FAMILIES[family][8]),
            losses=Losses.of(l2=1.0, features=1.0, vsd={"weight": 1.0, "guidance": guidance}, gan={"width": 4}),
        )  # fmt: skip
        module.train()
        base = module.generator.base
        frozen = {name: value.clone() for name, value in base.named_parameters() if not value.requires_grad}
        router = module.generator.adapters.router
        router.standardize(torch.zeros(router.num_scores), torch.ones(router.num_scores), torch.linspace(0, 1, 9))
        phase = OneStepPhase(
            module.objective, module.build_networks(), backward=lambda loss, average: loss.backward(),
            update=lambda network: network.optimizer.step(), **module.step_settings,
        )  # fmt: skip
        for step in range(2):
            draws = Draws.of_step(seed=0, step=step, first=0, count=2, device=torch.device("cpu"))
            report = phase.run({"lr": images(2), "hr": torch.rand(2, 3, 16, 16)}, draws, step=step)
            assert {"l2", "features", "vsd", "gan", "balance"} <= report.terms.keys()
            assert {"generator", "score", "discriminator"} == report.norms.keys()
            assert all(norm.isfinite() and norm > 0 for norm in report.norms.values())
        for name, value in base.named_parameters():
            if name in frozen:
                torch.testing.assert_close(value, frozen[name], atol=0, rtol=0, msg=name)
        generator = module.generator.eval()
        save_generator(tmp_path / "model", generator, include_base=True)
        again = load_generator(tmp_path / "model")
        with torch.no_grad():
            torch.testing.assert_close(again(images()).sr, generator(images()).sr, atol=1e-5, rtol=0)

    def test_checkpointing_gives_the_same_gradients(self, twins: Path, family: str) -> None:
        found = []
        for checkpointing in (False, True):
            generator = build(twins / family, family, awake=True, checkpointing=checkpointing).train()
            generator(images(2)).sr.square().mean().backward()
            found.append([one.grad for one in adapter_parameters(generator.base) if one.grad is not None])
        torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
        assert any(one.abs().sum() > 0 for one in found[0])

    def test_features_have_their_widths_and_depend_on_the_text(self, twins: Path, family: str) -> None:
        base = load_base(twins / family).eval().requires_grad_(False)
        z = base.encode(torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
        maps = base.features(z, torch.tensor([5, 100]))
        assert [one.shape[1] for one in maps] == base.feature_widths
        assert all(one.ndim == 4 and len(one) == 2 for one in maps)
        maps[-1].square().mean().backward()
        assert z.grad.abs().sum() > 0
        other = base.features(z, torch.tensor([5, 100]), base.condition("degraded"))
        assert not torch.allclose(maps[-1], other[-1])

    @pytest.mark.parametrize(("slip", "error", "words"), [
        ("family", ConfigError, "StableDiffusion3Pipeline"),
        ("prompts", WeightsError, "text_encoder"),
        ("latents", ConfigError, "latent channels"),
    ])  # fmt: skip
    def test_what_cannot_work_is_refused(
        self, twins: Path, family: str, tmp_path: Path, slip: str, error: type[Exception], words: str
    ) -> None:
        import shutil

        import diffusers

        folder = Path(shutil.copytree(twins / family, tmp_path / "twin"))
        if slip == "family":
            (folder / "model_index.json").write_text('{"_class_name": "HunyuanDiTPipeline"}')
        elif slip == "prompts":
            (folder / "prompt_embeddings.safetensors").unlink()
        else:
            shutil.rmtree(folder / "vae")
            kind = getattr(diffusers, FAMILIES[family][3])
            kind(latent_channels=8, **_VAE).save_pretrained(folder / "vae")
        with pytest.raises(error, match=words) as caught:
            load_base(folder)
        assert "\n" not in str(caught.value)


def test_a_distilled_base_takes_no_guidance_and_a_flow_no_residual(twins: Path) -> None:
    base = load_base(twins / "flux2-klein")
    with pytest.raises(ConfigError, match="distilled"):
        Teacher(base, ScoreConfig(guidance=7.5))
    with pytest.raises(ConfigError, match="epsilon"):
        OneStepGenerator(base, one_step=OneStepConfig(timestep=1, parametrization="residual"))


def test_the_shift_is_the_schedulers_own(twins: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)
    torch.testing.assert_close(load_base(twins / "sd3").sigmas, sigmas, atol=1e-6, rtol=1e-5)
