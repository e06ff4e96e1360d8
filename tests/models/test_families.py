"""Every family of bases: one table of small twins, one list of properties."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_twins import draws, plain_phase
from twins import FAMILIES, adapters, awaken, build, images, pipeline, write_twin

from morsr.adapters import active_adapters, adapter_parameters, merged
from morsr.errors import ConfigError, WeightsError
from morsr.models.bases import load_base
from morsr.models.exchange.fixed import export_lora
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.losses import Distillation, Gan, Losses, Weight
from morsr.models.saving import save_generator
from morsr.models.score_network import ScoreConfig, Teacher
from morsr.training.module import OneStepSRModule


class Twin(NamedTuple):
    """A twin with awake adapters, not to be trained, and what the base and a fresh set make of the images."""

    name: str
    folder: Path
    generator: OneStepGenerator
    bare: Tensor
    fresh: Tensor

    def restore(self, lr: Tensor) -> Tensor:
        with torch.no_grad():
            return self.generator(lr).sr

    def predict(self, base: Any) -> Tensor:
        """The network's output for fixed latents."""
        z = torch.randn(1, base.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            return base.predict(z, FAMILIES[self.name].timestep)


# sd15 is of the class that sd21's own tests run.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "sd15")) for name in FAMILIES]
)
def twin(request, tmp_path_factory):
    name = request.param
    folder = write_twin(tmp_path_factory.mktemp("families") / name, name)
    generator = build(folder, name)
    with torch.no_grad():
        fresh = generator(images()).sr
        with active_adapters(generator.base, None):
            bare = generator(images()).sr
    return Twin(name, folder, awaken(generator), bare, fresh)


def drawn(made: Any, base: Any, z: Tensor) -> Tensor:
    """What a pipeline makes of noise in one step without classifier-free guidance."""
    tokens, pooled = base.condition()
    options: dict[str, Any] = {"prompt_embeds": tokens, "latents": z, "guidance_scale": 1.0}
    if pooled is not None:
        options["pooled_prompt_embeds"] = pooled
    if type(made).__name__ == "FluxPipeline":
        options |= {"latents": made._pack_latents(z, *z.shape), "guidance_scale": 3.5}
    elif type(made).__name__ == "ZImagePipeline":
        options |= {"prompt_embeds": list(tokens), "guidance_scale": 0.0}
    elif type(made).__name__ == "SanaPipeline":
        options |= {"prompt_attention_mask": torch.ones(tokens.shape[:2]), "use_resolution_binning": False}
    side = z.shape[-1] * base.latent_factor
    return made(**options, num_inference_steps=1, height=side, width=side, output_type="pt").images


class TestEveryFamily:
    def test_one_step_inverts_its_own_noise_and_decodes_what_it_encodes(self, twin, monkeypatch):
        base = twin.generator.base
        assert base.pipeline == FAMILIES[twin.name].pipeline
        with torch.no_grad(), active_adapters(base, None):
            pixels, decode = torch.rand(2, 3, 16, 8) * 2 - 1, base.vae.decode
            z0, encoded, given = base.encode(pixels), base.vae.encode(pixels), []
            monkeypatch.setattr(base.vae, "decode", lambda raw: given.append(raw) or decode(raw))
            assert base.decode(z0).shape == pixels.shape
        raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
        torch.testing.assert_close(given[0], raw, atol=1e-5, rtol=1e-5)
        t, noise = torch.tensor([3, 700]), torch.randn_like(z0)
        z_t = base.noised(z0, noise, t)
        torch.testing.assert_close(base.clean_from(z_t, base.target(z0, noise), t), z0.float(), atol=1e-4, rtol=1e-4)
        quiet = base.noised(z0, torch.zeros_like(z0), 300)
        torch.testing.assert_close(quiet, base.signal(300) * z0)

    def test_a_fresh_set_changes_nothing_and_a_trained_one_does(self, twin):
        torch.testing.assert_close(twin.fresh, twin.bare, atol=0, rtol=0)
        assert (twin.restore(images()) - twin.fresh).abs().max() > 1e-4

    def test_every_image_is_routed_and_restored_as_if_alone(self, twin):
        together = twin.restore(images())
        chosen = twin.generator.adapters.routing.chosen
        assert not torch.equal(chosen[:, 0], chosen[:, 2])
        apart = torch.cat([twin.restore(one[None]) for one in images()])
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)

    def test_merged_weights_give_the_same_image(self, twin):
        generator, expected = twin.generator, twin.restore(images(1))
        enlarged = F.interpolate(images(1), size=(16, 16), mode="bicubic").clamp(0, 1)
        with torch.no_grad(), merged(generator.base):
            found = generator.decode(generator.denoise(generator.encode(enlarged)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(twin.restore(images(1)), expected, atol=0, rtol=0)

    def test_a_saved_folder_restores_the_same(self, twin, tmp_path):
        save_generator(tmp_path / "model", twin.generator, include_base=True)
        again = load_generator(tmp_path / "model")
        assert again.adapters.layer_names == twin.generator.adapters.layer_names
        assert again.base.distilled == FAMILIES[twin.name].distilled
        with torch.no_grad():
            torch.testing.assert_close(again(images()).sr, twin.restore(images()), atol=1e-5, rtol=0)

    def test_the_familys_pipeline_with_the_lora_takes_the_same_step(self, twin, tmp_path):
        """One step from pure noise: diffusers' own timestep, packing, places, guidance, scaling and decoding."""
        twin.restore(images(1))
        base = twin.generator.base
        z = torch.randn(1, base.in_channels, 16, 16)
        with torch.no_grad():
            expected = (base.decode(base.clean(z, 999)) / 2 + 0.5).clamp(0, 1)
        export_lora(tmp_path, twin.generator)
        made = pipeline(load_base(twin.folder).eval())
        made.load_lora_weights(tmp_path)
        torch.testing.assert_close(drawn(made, base, z), expected, atol=1e-3, rtol=0)
        made.unload_lora_weights()
        assert (drawn(made, base, z) - expected).abs().max() > 1e-2

    def test_two_steps_of_every_loss_move_only_what_they_train(self, twin):
        family = FAMILIES[twin.name]
        vsd = Distillation(guidance=1.0 if family.distilled else 2.0, target=0.3, samples=2)
        module = OneStepSRModule(
            base=str(twin.folder), adapters=adapters(twin.name), lr=1e-2,
            one_step=OneStepConfig(timestep=family.timestep),
            losses=Losses(features=Weight(), vsd=vsd, gan=Gan(width=4)),
        )  # fmt: skip
        base, trained = module.generator.base, module.objective.trained()
        before = {name: value.clone() for name, value in base.named_parameters()}
        router = module.generator.adapters.router
        router.standardize(torch.zeros(router.num_scores), torch.ones(router.num_scores), torch.linspace(0, 1, 9))
        phase = plain_phase(module, **module.step_settings)
        for step in range(2):
            report = phase.run({"lr": images(2), "hr": torch.rand(2, 3, 16, 16)}, draws(step=step), step=step)
            assert {"l2", "features", "vsd", "gan", "balance"} <= report.terms.keys()
            assert {"generator", "score", "discriminator"} == report.norms.keys()
            assert all(norm.isfinite() and norm > 0 for norm in report.norms.values())
        mine = {id(one) for network in trained.values() for one in network}
        for name, value in base.named_parameters():
            if id(value) not in mine:
                torch.testing.assert_close(value, before[name], atol=0, rtol=0, msg=name)
        for network in ("generator", "score"):
            own = {id(one) for one in trained[network]}
            assert any(
                id(value) in own and not torch.equal(value, before[name]) for name, value in base.named_parameters()
            )

    def test_checkpointing_gives_the_same_gradients(self, twin):
        found, sizes = [], []
        for checkpointing in (False, True):
            generator = awaken(build(twin.folder, twin.name, checkpointing=checkpointing)).train()
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = generator(images(2)).sr.square().mean()
            # What runs between forward and backward, as a teacher does, must not reach the recomputed layers.
            with torch.no_grad(), active_adapters(generator.base, None):
                generator.route(images(3))
            loss.backward()
            found.append([one.grad for one in adapter_parameters(generator.base) if one.grad is not None])
            sizes.append(sum(kept.values()))
        torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
        assert any(one.abs().sum() > 0 for one in found[0])
        assert sizes[1] < sizes[0]

    def test_features_have_their_widths_and_depend_on_the_text(self, twin):
        base = twin.generator.base
        z, t = torch.randn(2, base.in_channels, 8, 8, requires_grad=True), torch.tensor([5, 100])
        with active_adapters(base, None):
            maps = base.features(z, t)
            other = base.features(z, t, base.condition("degraded"))
        assert [one.shape[1] for one in maps] == base.feature_widths
        assert all(one.ndim == 4 and len(one) == 2 for one in maps)
        maps[-1].square().mean().backward()
        assert z.grad.abs().sum() > 0
        assert (maps[-1] - other[-1]).abs().max() > 1e-5

    def test_features_follow_the_place_in_the_image(self, twin):
        """A token is put where its pixels are: a change in a corner shows most in that corner."""
        base = twin.generator.base
        z = torch.randn(1, base.in_channels, 8, 8)
        near = z.clone()
        near[..., :2, 6:] += 3
        with torch.no_grad(), active_adapters(base, None):
            change = (
                (base.features(near, torch.tensor([5]))[0] - base.features(z, torch.tensor([5]))[0]).abs().sum(1)[0]
            )
        row, column = divmod(int(change.argmax()), change.shape[1])
        assert (row < change.shape[0] / 2, column >= change.shape[1] / 2) == (True, True)

    def test_half_precision_keeps_the_last_layer_and_the_output_in_float32(self, twin):
        exact = twin.predict(load_base(twin.folder).eval())
        base = load_base(twin.folder, dtype="bfloat16").eval()
        assert {one.dtype for one in base.denoiser.parameters()} == {torch.bfloat16, torch.float32}
        found = twin.predict(base)
        assert found.dtype == torch.float32
        assert (found - exact).abs().mean() < 0.1 * exact.abs().mean()
        assert not torch.equal(found, found.bfloat16().float())

    @pytest.mark.parametrize(("slip", "error", "words"), [
        ("family", ConfigError, "StableDiffusion3Pipeline"),
        ("network", ConfigError, "expected a"),
        ("prompts", WeightsError, "text_encoder"),
        ("latents", ConfigError, "latent channels"),
    ])  # fmt: skip
    def test_what_cannot_work_is_refused(self, twin, tmp_path, slip, error, words):
        import diffusers

        family, folder = FAMILIES[twin.name], Path(shutil.copytree(twin.folder, tmp_path / "twin"))
        if slip == "family":
            (folder / "model_index.json").write_text('{"_class_name": "HunyuanDiTPipeline"}')
        elif slip == "network":
            config = folder / family.part / "config.json"
            config.write_text(config.read_text().replace(family.network, "PixArtTransformer2DModel"))
        elif slip == "prompts":
            (folder / "prompt_embeddings.safetensors").unlink()
        else:
            shutil.rmtree(folder / "vae")
            getattr(diffusers, family.vae)(**{**family.vae_settings, "latent_channels": 8}).save_pretrained(
                folder / "vae"
            )
        with pytest.raises(error, match=words) as caught:
            load_base(folder)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return load_base(write_twin(tmp_path_factory.mktemp("klein") / "twin", "flux2-klein"))


def test_a_distilled_base_takes_no_guidance_and_a_flow_no_residual(klein):
    with pytest.raises(ConfigError, match="distilled"):
        Teacher(klein, ScoreConfig(guidance=7.5))
    with pytest.raises(ConfigError, match="epsilon"):
        OneStepGenerator(klein, one_step=OneStepConfig(timestep=1, parametrization="residual"))


def test_the_shift_is_the_schedulers_own(tmp_path, klein):
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)
    for name in ("sd3", "sana"):
        torch.testing.assert_close(load_base(write_twin(tmp_path / name, name)).sigmas, sigmas, atol=1e-6, rtol=1e-5)
    assert klein.sigmas[499] == pytest.approx(
        0.7595, abs=1e-3
    )  # e^1.15 / (e^1.15 + 1): the largest shift of the schedule
