"""The losses: distillation, adversarial, perceptual and pixel terms against their equations."""

from types import SimpleNamespace

import pytest
import torch
from training_twins import draws
from twins import write_twin

from morsr.adapters import MoRConfig, active_adapters, inject
from morsr.functional.diffusion import scaled_linear_alphas_cumprod
from morsr.functional.losses import hinge_generator
from morsr.models.bases import load_base
from morsr.models.losses import build_lpips, image_losses
from morsr.models.score_network import ScoreConfig, ScoreNetwork, Teacher


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_target_score_distillation_follows_its_equation(name, tmp_path):
    """Noise and flow: the generated latents go on by the score network, the HR latents by the teacher."""
    base = load_base(write_twin(tmp_path / "base", name)).eval()
    score = ScoreNetwork(
        base, ScoreConfig(guidance=3.0, low=100, high=600, target=0.3, samples=3, stride=40, later=0.5)
    )
    for parameter in score.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, hr, d = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8), draws()
    t, noise = d.timesteps("distillation/t", 100, 600), d.normal("distillation/noise", (4, 8, 8))

    def levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors on the latents and on the noise."""
        if name == "sd3":
            u = ((t + 1) / 1000).view(-1, 1, 1, 1)
            return 1 - 3 * u / (1 + 2 * u), 3 * u / (1 + 2 * u)
        kept = scaled_linear_alphas_cumprod()[t].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def network(z_t: torch.Tensor, t: torch.Tensor, adapters: str | None) -> torch.Tensor:
        with torch.no_grad(), active_adapters(base, adapters):
            clean, degraded = (base.predict(z_t, t, base.condition(side)) for side in ("clean", "degraded"))
        return clean if adapters else degraded + 3 * (clean - degraded)

    a, b = levels(t)
    generated, real, gradient = a * z.detach() + b * noise, a * hr + b * noise, torch.zeros(2, 4, 8, 8)
    for weight in (1, 0.5, 0.5):
        teacher, own, wanted = network(generated, t, None), network(generated, t, "score"), network(real, t, None)
        direction = 0.7 * (teacher - own) + 0.3 * (teacher - wanted)
        seen = generated - b * teacher if name == "sd3" else (generated - b * teacher) / a
        direction = direction * (b if name == "sd3" else b / a)
        gradient += weight * direction / (z.detach() - seen).abs().mean((1, 2, 3), keepdim=True)
        t = t - 40
        (a_then, b_then), (a, b) = (a, b), levels(t)
        if name == "sd3":
            generated, real = generated - (b_then - b) * own, real - (b_then - b) * wanted
        else:
            generated, real = (
                a * (z_t - b_then * noise) / a_then + b * noise for z_t, noise in ((generated, own), (real, wanted))
            )
    score.variational_loss(z, d, hr).backward()
    torch.testing.assert_close(z.grad, 2 * gradient / z.numel(), rtol=1e-3, atol=1e-6)


def test_classifier_distillation_vanishes_without_guidance_and_needs_no_score_network(small_base):
    base = load_base(small_base)
    inject(base, MoRConfig.lora(2, targets=("sd_unet@unet",)))
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert Teacher(base, ScoreConfig(guidance=0.0)).classifier_loss(z, draws()).item() == 0
    loss = Teacher(base, ScoreConfig(guidance=2.0)).classifier_loss(z, draws())
    loss.backward()
    assert z.grad.abs().sum() > 0


def test_scales_of_a_hinge_loss_count_alike_however_many_places_they_have():
    torch.testing.assert_close(hinge_generator([torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 1, 1)]), torch.tensor(-0.5))


def test_draws_are_the_samples_own():
    whole, second, next_step = draws(4, step=5), draws(2, step=5, first=2), draws(4, step=6)
    torch.testing.assert_close(whole[2:].normal("a", (3, 3)), second.normal("a", (3, 3)), rtol=0, atol=0)
    assert not torch.equal(whole.normal("a", (3,)), whole.normal("b", (3,)))
    assert not torch.equal(whole.normal("a", (3,)), next_step.normal("a", (3,)))
    assert set(draws(500).timesteps("t", 20, 23).tolist()) == {20, 21, 22, 23}


def test_lpips_has_gradient_and_is_zero_for_equals(monkeypatch):
    from torchvision.models import vgg

    random_vgg = SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"]))
    monkeypatch.setattr("torchvision.models.vgg16", lambda *args, **kwargs: random_vgg)
    lpips = build_lpips()
    sr, hr = torch.rand(2, 2, 3, 32, 32)
    sr.requires_grad_()
    image_losses(lpips)["lpips"](sr, hr).backward()
    assert sr.grad.abs().sum() > 0
    assert image_losses(lpips)["lpips"](hr, hr).item() == pytest.approx(0, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_pixel_terms_are_their_formulas():
    sr, hr = torch.rand(2, 3, 3, 16, 16)
    error, losses = sr - hr, image_losses()
    expected = {"l1": error.abs().mean(), "l2": 4 * error.square().mean(),
                "charbonnier": (error.square() + 1e-6).sqrt().mean()}  # fmt: skip
    torch.testing.assert_close({name: losses[name](sr, hr) for name in expected}, expected)


def test_psnr_term_counts_every_image_alike_and_spares_perfect_ones():
    hr = torch.rand(2, 3, 16, 16)
    sr = torch.stack([(hr[0] + 0.3 * torch.randn_like(hr[0])).clamp(0, 1), hr[1] + 0.01]).requires_grad_()
    image_losses()["psnr"](sr, hr).backward()
    hard, easy = (sr.grad[i].square().sum() for i in range(2))
    # Mean square error alone would give the hard image about 900 times the squared gradient of the easy one.
    assert hard < 10 * easy
    torch.testing.assert_close(image_losses()["psnr"](hr, hr), torch.tensor(-30.0))
