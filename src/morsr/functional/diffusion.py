"""Arithmetic of a latent diffusion model: noise schedule, forward noising, clean-latent estimates, guidance.

Everything here runs in float32 whatever comes in: at t = 999 of Stable Diffusion's schedule an error of the predicted
noise grows 14.6 times on its way into the clean latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Parametrization = Literal["epsilon", "residual"]


def scaled_linear_alphas_cumprod(steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Return ᾱ_t, the share of signal variance left at each timestep, of the scaled-linear schedule.

    The square roots of the betas are linear in t. Shape (steps,), float32 computed through float64.

    >>> scaled_linear_alphas_cumprod()[999].item()  # doctest: +ELLIPSIS
    0.0046600...

    Source: Stable Diffusion's `scaled_linear` betas (CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def _per_image(value: Tensor | float, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Forward process q(z_t | z_0): √ᾱ z_0 + √(1 − ᾱ) ε for (B, C, h, w), with one ᾱ_t or one per image (B,).

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", eq. 4.
    """
    alpha_bar = _per_image(alpha_bar, latents)
    return alpha_bar.sqrt() * latents.float() + (1 - alpha_bar).sqrt() * noise.float()


def clean_latents(latents: Tensor, prediction: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Clean latents (z_t − √(1 − ᾱ) ε) / √ᾱ, as OSEDiff reads a low-quality latent at t = 999.

    Args:
        latents: z_t, or the encoded low-quality image that stands in for it, (B, C, h, w).
        prediction: ε, the network's output, of the same shape.
        alpha_bar: ᾱ_t, one number or one per image (B,).

    Source: OSEDiff (arXiv 2406.08177) eq. 4.
    """
    latents, prediction = latents.float(), prediction.float()
    alpha_bar = _per_image(alpha_bar, latents)
    return (latents - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()


def flow_noised(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Rectified flow: (1 − σ) z_0 + σ n, σ one number or one per image (B,).

    Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), eq. 13.
    """
    sigma = _per_image(sigma, latents)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def flow_clean(latents: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Clean latents z_t − σ v behind z_t, where the velocity is v = n − z_0."""
    return latents.float() - _per_image(sigma, latents) * velocity.float()


def pair_moments(degraded: Tensor, clean: Tensor) -> Tensor:
    """What `matching_timestep` needs of pairs of latents, (4,) float64: number of values, Σ d c, Σ c², Σ d²."""
    degraded, clean = degraded.double(), clean.double()
    sums = ((degraded * clean).sum(), clean.square().sum(), degraded.square().sum())
    return torch.stack([clean.new_tensor(clean.numel()), *sums])


def matching_timestep(moments: Tensor, signal: Tensor, noise: Tensor) -> int:
    """The timestep whose z_t = a z_0 + b n has the signal-to-noise ratio of degraded latents against the clean ones.

    A degraded latent is read as s z_0 + r with the s of least squares; its ratio s² / mean r² is compared with a² / b²
    on a logarithmic scale.

    Args:
        moments: (4,) of `pair_moments`, summed over batches.
        signal, noise: a and b of every timestep, (T,).

    Source: OMGSR (arXiv 2508.08227) for the idea of a middle timestep that fits the degraded latents.
    """
    count, both, clean, degraded = moments.double().cpu().unbind()
    share = (both / clean).clamp_min(1e-12)
    rest = ((degraded - share * both) / count).clamp_min(1e-24)
    ratios = (signal.double().cpu().clamp_min(1e-12) / noise.double().cpu().clamp_min(1e-12)).log()
    return int((ratios - (share / rest.sqrt()).log()).abs().argmin())


def epsilon_from_velocity(latents: Tensor, velocity: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Convert a v-prediction into the noise it implies: ε = √ᾱ v + √(1 − ᾱ) z_t.

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D.
    """
    alpha_bar = _per_image(alpha_bar, latents)
    return alpha_bar.sqrt() * velocity.float() + (1 - alpha_bar).sqrt() * latents.float()


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ε_u + s (ε_c − ε_u): scale 1 is the conditional prediction, 0 the unconditional.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", eq. 6 with s = 1 + w.
    """
    unconditional = unconditional.float()
    return unconditional + scale * (conditional.float() - unconditional)


def distillation_gradient(latents: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Direction from what the real distribution holds for likely to what the generated one does.

    (x0_fake − x0_real) / w with w = mean |z − x0_real| of each image, at least 1e-4: the generator moves against it.

    Args:
        latents: generated z (B, C, h, w).
        fake: clean latents that the score network of the generated images (VSD), or the unguided teacher (CSD), sees.
        real: clean latents that the guided teacher sees.

    Source: OSEDiff (arXiv 2406.08177) eq. 9, with the weight of DMD (arXiv 2311.18828) eq. 8.
    """
    latents, fake, real = latents.float(), fake.float(), real.float()
    weight = (latents - real).abs().flatten(1).mean(1).clamp(min=1e-4)
    return (fake - real) / _per_image(weight, latents)


def distillation_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """Mean square of z to its own target z − gradient: a scalar whose derivative by z is 2/numel times the gradient.

    No gradient flows through the target, so neither teacher nor score network is moved by it.
    """
    target = (latents - gradient).detach()
    return (latents.float() - target.float()).square().mean()
