import torch

from morsr.functional.diffusion import add_noise, epsilon_from_velocity, scaled_linear_alphas_cumprod


def test_schedule_has_the_published_end():
    alphas = scaled_linear_alphas_cumprod()
    torch.testing.assert_close(alphas[999], torch.tensor(0.00466010), atol=1e-8, rtol=0)
    # the gain on the latents and on the noise that OSEDiff's step has at t = 999
    torch.testing.assert_close(1 / alphas[999].sqrt(), torch.tensor(14.6488), atol=2e-4, rtol=0)
    torch.testing.assert_close(((1 - alphas[999]) / alphas[999]).sqrt(), torch.tensor(14.6146), atol=2e-4, rtol=0)
    assert (alphas.diff() < 0).all()


def test_schedule_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scaled_linear_alphas_cumprod(), scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_velocity_holds_the_noise():
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    alpha_bar = 0.3
    velocity = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latents
    recovered = epsilon_from_velocity(add_noise(latents, noise, alpha_bar), velocity, alpha_bar)
    torch.testing.assert_close(recovered, noise, atol=1e-5, rtol=1e-5)
