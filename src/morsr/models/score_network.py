"""Variational score distillation: a frozen teacher and a score network, both of them the generator's own network.

The base weights are held once. The teacher is the network without adapters, the score network the same with a small
separate adapter set; which one runs is switched for each call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from morsr.adapters import MoRConfig, active_adapters, adapter_parameters, inject
from morsr.errors import ConfigError, check_fields
from morsr.functional.diffusion import distillation_gradient, distillation_loss, guide
from morsr.models.bases import Base
from morsr.models.bases.base import STEPS
from morsr.models.draws import Draws

SCORE_SET = "score"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Settings of the distillation; the defaults are OSEDiff's.

    Args:
        rank: of the score network's LoRA.
        scale: factor on its update, peft's alpha / r (OSEDiff: 8 / 4).
        targets: layers that it adapts; empty for those of the base's family.
        guidance: classifier-free guidance of the teacher, over the base's "degraded" embedding.
        low, high: timesteps of the distillation, both included.
        target: share of target score matching in `variational_loss`, 0 to 1 (TSD-SR: 0.3).
        samples: noisy latents per image, each with less noise than the one before (TSD-SR: 4).
        stride: timesteps from one to the next (TSD-SR: 50).
        later: weight of each one after the first (TSD-SR: 0.3).
        lr: learning rate of the score network.

    Raises:
        ConfigError: a setting outside its range.
    """

    rank: int = 4
    scale: float = 2.0
    targets: tuple[str, ...] = ()
    guidance: float = 7.5
    low: int = 20
    high: int = 979
    target: ClosedUnitInterval = 0.0
    samples: PositiveInt = 1
    stride: PositiveInt = 50
    later: NonNegativeFloat = 0.3
    lr: float = 5e-5

    def __post_init__(self) -> None:
        check_fields(self, least={"rank": 1})
        if not self.low <= self.high <= 999:
            raise ConfigError(f"score: expected 0 <= low <= high <= 999, got {self.low} and {self.high}")


class Teacher:
    """The frozen network of the generator's base, which is not owned, as the judge of generated latents."""

    def __init__(self, base: Base, config: ScoreConfig) -> None:
        if base.distilled and config.guidance != 1:
            raise ConfigError(
                f"guidance: {base.base_id} is distilled and takes none; expected 1, got {config.guidance:g}; "
                "its undistilled sibling takes guidance"
            )
        self.base, self.config = base, config

    def classifier_loss(self, latents: Tensor, draws: Draws) -> Tensor:
        """Classifier score distillation of generated z (B, C, h, w): the guided teacher against its own negative side.

        Source: PiSA-SR (arXiv 2412.03017), section on the semantic-level adapters.
        """
        with torch.no_grad():
            noisy, _, timesteps = self.noised(latents, draws, "distillation", self.config.low, self.config.high)
            conditional, unconditional = self._both_sides(noisy, timesteps)
            guided = guide(conditional, unconditional, self.config.guidance)
            real, fake = (self.base.clean_from(noisy, noise, timesteps) for noise in (guided, unconditional))
            gradient = distillation_gradient(latents, fake, real)
        return distillation_loss(latents, gradient)

    def noised(self, latents: Tensor, draws: Draws, name: str, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents with noise of a random timestep each, the noise, and the timesteps."""
        timesteps = draws.timesteps(f"{name}/t", low, high)
        noise = draws.normal(f"{name}/noise", tuple(latents.shape[1:]))
        return self.base.noised(latents, noise, timesteps), noise, timesteps

    def guided(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The teacher's prediction with guidance, in float32."""
        return guide(*self._both_sides(noisy, timesteps), self.config.guidance)

    def _both_sides(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        base = self.base
        with active_adapters(base, None):
            conditional = base.predict(noisy, timesteps, base.condition("clean"))
            unconditional = base.predict(noisy, timesteps, base.condition("degraded"))
        return conditional, unconditional


class ScoreNetwork(Teacher):
    """The teacher, and beside it an adapter set that learns the distribution of the generated latents.

    The set is injected into the generator's base here, and nothing is copied.

    Source: OSEDiff (arXiv 2406.08177) section 3.3; ProlificDreamer (arXiv 2305.16213) for the distillation.
    """

    def __init__(self, base: Base, config: ScoreConfig) -> None:
        super().__init__(base, config)
        adapters = MoRConfig.lora(config.rank, scale=config.scale, targets=config.targets or base.targets)
        inject(base, adapters, name=SCORE_SET)

    def parameters(self) -> list[nn.Parameter]:
        """What the score network trains."""
        return adapter_parameters(self.base, SCORE_SET)

    def variational_loss(self, latents: Tensor, draws: Draws, real: Tensor | None = None) -> Tensor:
        """Variational score distillation of generated latents z, and target score distillation with a `target`.

        t ~ U{low..high} per image; the score network and the guided teacher each say what clean latents they see behind
        the same noise; z moves from the former towards the latter. Neither of them gets a gradient. With a `target`,
        what the teacher predicts for the HR latents under the same noise takes that share of the score network's
        prediction. With several `samples`, both noisy latents then go on towards less noise, each along the prediction
        made for it, and the gradients are added up.

        Args:
            latents, real: generated and HR latents (B, C, h, w), scaled; the latter are needed with a `target`.
            draws: of these images.

        Source: OSEDiff (arXiv 2406.08177) section 3.3; for target and samples TSD-SR (arXiv 2411.18263) sections 3.2
            and 3.3, with OSEDiff's weight of an image, not σ².
        """
        config, base, gradient = self.config, self.base, torch.zeros_like(latents, dtype=torch.float32)
        with torch.no_grad():
            noisy, _, t = self.noised(latents, draws, "distillation", config.low, config.high)
            aim = self.noised(real, draws, "distillation", config.low, config.high)[0] if real is not None else None
            for sample in range(config.samples):
                with active_adapters(base, SCORE_SET):
                    fake = base.predict(noisy, t)
                guided, mixed, later = self.guided(noisy, t), fake, (t - config.stride).clamp_min(0)
                if aim is not None:
                    wanted = self.guided(aim, t)
                    mixed = torch.lerp(fake, wanted, config.target)
                    aim = base.moved(aim, wanted, t, later)
                seen = (base.clean_from(noisy, prediction, t) for prediction in (mixed, guided))
                gradient += (config.later if sample else 1) * distillation_gradient(latents, *seen)
                noisy, t = base.moved(noisy, fake, t, later), later
        return distillation_loss(latents, gradient)

    def denoising_loss(self, latents: Tensor, draws: Draws) -> Tensor:
        """The score network's own loss: mean square error of its prediction on generated latents, at any timestep.

        The latents are detached here: the generator gets no gradient.
        """
        latents = latents.detach()
        noisy, noise, timesteps = self.noised(latents, draws, "score", 0, STEPS - 1)
        with active_adapters(self.base, SCORE_SET):
            predicted = self.base.predict(noisy, timesteps)
        return (predicted.float() - self.base.target(latents, noise)).square().mean()
