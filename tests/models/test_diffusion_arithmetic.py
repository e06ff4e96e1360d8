import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morsr.functional.diffusion import (
    add_noise,
    clean_latents,
    epsilon_from_velocity,
    guide,
    scaled_linear_alphas_cumprod,
)


def test_schedule_has_the_published_end() -> None:
    alphas = scaled_linear_alphas_cumprod()
    torch.testing.assert_close(alphas[999], torch.tensor(0.00466010), atol=1e-8, rtol=0)
    # the gain on the latents and on the noise that OSEDiff's step has at t = 999
    torch.testing.assert_close(1 / alphas[999].sqrt(), torch.tensor(14.6488), atol=2e-4, rtol=0)
    torch.testing.assert_close(((1 - alphas[999]) / alphas[999]).sqrt(), torch.tensor(14.6146), atol=2e-4, rtol=0)
    assert (alphas.diff() < 0).all()


def test_schedule_agrees_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scaled_linear_alphas_cumprod(), scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(0, 1000))
def test_the_true_noise_gives_back_the_clean_latents(timestep: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 2, 4, 3, 3, generator=generator)
    alpha_bar = scaled_linear_alphas_cumprod()[timestep]
    noisy = add_noise(latents, noise, alpha_bar)
    torch.testing.assert_close(clean_latents(noisy, noise, alpha_bar), latents, atol=2e-5, rtol=1e-4)


def test_velocity_holds_the_noise() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    alpha_bar = 0.3
    velocity = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latents
    recovered = epsilon_from_velocity(add_noise(latents, noise, alpha_bar), velocity, alpha_bar)
    torch.testing.assert_close(recovered, noise, atol=1e-5, rtol=1e-5)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 2).bfloat16()
    assert clean_latents(latents, noise, 0.00466).dtype == torch.float32


def test_guidance_between_and_beyond() -> None:
    conditional, unconditional = torch.randn(2, 3)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(
        guide(conditional, unconditional, 7.5) - unconditional, 7.5 * (conditional - unconditional)
    )
