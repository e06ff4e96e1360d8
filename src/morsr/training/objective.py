"""All losses of one-step training as one object that needs no trainer: what each network minimises.

generator       L2 + LPIPS + … (image terms) + λ1 VSD + λ2 GAN + balance
score           its noise prediction on the generated latents
discriminator   hinge loss on generated and real latents
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters import active_adapters, adapter_parameters
from morsr.errors import ConfigError
from morsr.models.discriminator import Discriminator
from morsr.models.draws import Draws
from morsr.models.generator import GeneratorOutput, OneStepGenerator, pad_to_multiple
from morsr.models.losses import Losses, TrainingStep, Weight, build_lpips, encoder_features, image_losses
from morsr.models.score_network import ScoreNetwork, Teacher

Loss = Callable[[TrainingStep], Tensor]


class GeneratorLoss(NamedTuple):
    """Unweighted terms by name, their weighted sum, and the pass that they were taken from."""

    terms: dict[str, Tensor]
    total: Tensor
    output: GeneratorOutput


class Helper(NamedTuple):
    """A network that helps the generator.

    parameters: what it trains. loss: what it minimises; sr and z0 of the step are detached.
    lr: None for the generator's. start: generator step from which it moves.
    """

    parameters: list[nn.Parameter]
    loss: Loss
    lr: float | None
    start: int


class Objective:
    """The generator's terms and the losses of the networks that help it.

    Args:
        generator: the one-step generator; score network and discriminator share its base.
        losses: the terms; None: l2 and the balance.
        lpips: the network of `build_lpips`, where it is built already.

    Attributes:
        terms: weight and loss of every term.
        helpers: "score" and "discriminator", and the networks of the user's own terms.

    Raises:
        ConfigError: no term with a weight.
    """

    def __init__(
        self, generator: OneStepGenerator, losses: Losses | None = None, *, lpips: nn.Module | None = None
    ) -> None:
        self.generator, self.base = generator, generator.base
        losses = losses or Losses()
        self.extra = {name: term for name, term in (losses.extra or {}).items() if term is not None}
        if taken := [name for name in self.extra if hasattr(losses, name)]:
            raise ConfigError(f"losses.extra.{taken[0]}: this name is a term of morsr's; choose another")
        self.lpips = build_lpips() if losses.lpips and lpips is None else lpips
        self.discriminator: Discriminator | None = None
        self.terms: dict[str, tuple[Weight, Loss]] = {}
        for name, distance in image_losses(self.lpips, self._features).items():
            if weight := getattr(losses, name):
                self.terms[name] = weight, partial(self._of_images, distance)
        self.helpers: dict[str, Helper] = {}
        if vsd := losses.vsd:
            score = ScoreNetwork(self.base, vsd)
            self.terms["vsd"] = vsd, partial(self._of_latents, score.variational_loss, vsd.target > 0)
            own = partial(self._of_latents, score.denoising_loss, False)
            self.helpers["score"] = Helper(score.parameters(), own, vsd.lr, vsd.start)
        if csd := losses.csd:
            self.terms["csd"] = csd, partial(self._of_latents, Teacher(self.base, csd).classifier_loss, False)
        if gan := losses.gan:
            judge = self.discriminator = Discriminator(self.base, gan)
            self.terms["gan"] = gan, partial(self._of_latents, judge.generator_loss, False)
            own = partial(self._of_latents, judge.loss, True)
            self.helpers["discriminator"] = Helper(list(judge.parameters()), own, gan.lr, gan.start)
        for name, term in self.extra.items():
            term.setup(self.base)
            self.terms[name] = term.schedule, term
            for network, parameters in term.trained().items():
                if network in ("generator", *self.helpers):
                    raise ConfigError(f"losses.extra.{name}: there is a network {network!r} already; rename it")
                loss = partial(term.network_loss, network)
                self.helpers[network] = Helper(parameters, loss, term.lr, term.schedule.start)
        if not any(weight for weight, _ in self.terms.values()):
            raise ConfigError("losses: expected at least one term with a weight above 0, got none")
        if losses.balance and generator.adapters is not None and generator.adapters.is_routed:
            self.terms["balance"] = losses.balance, self._balance

    def _features(self, images: Tensor) -> list[Tensor]:
        with active_adapters(self.base, None):
            return encoder_features(self.base, images)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by network, the generator's first."""
        helpers = {name: helper.parameters for name, helper in self.helpers.items()}
        return {"generator": adapter_parameters(self.base, "generator"), **helpers}

    def generator_loss(self, batch: Mapping[str, Any], draws: Draws, *, step: int) -> GeneratorLoss:
        """Forward pass and all terms that count at this step.

        Args:
            batch: lr (B, 3, h, w) and hr (B, 3, H, W) in [0, 1], and where they are parts of larger images, "score_lr",
                the LR images that the degradation scores are taken from.
            draws: random numbers of these images.
            step: generator step.
        """
        lr, hr, adapters = batch["lr"], batch["hr"], self.generator.adapters
        noise = keep = None
        if adapters is not None and adapters.is_routed:
            if adapters.router.noise_sigma > 0:
                shape = (len(adapters.layer_names), adapters.config.num_slots)
                noise = draws.normal("router", shape).transpose(0, 1)
            if adapters.config.routed_dropout > 0:
                share = draws.timesteps("routed_dropout", 0, 999) / 1000
                keep = (share >= adapters.config.routed_dropout).float()
        output = self.generator(
            lr, size=(hr.shape[-2], hr.shape[-1]), score_lr=batch.get("score_lr"), noise=noise, keep=keep
        )
        severity = None if output.scores is None else known_severity(batch, output.scores.severity)
        now = TrainingStep(lr, hr, output.sr, output.z0, output.routing, draws, step, severity)
        terms: dict[str, Tensor] = {}
        total = output.sr.new_zeros(())
        for name, (weight, loss) in self.terms.items():
            if (factor := weight.at(step)) > 0:
                terms[name] = loss(now)
                total = total + factor * terms[name]
        return GeneratorLoss(terms, total, output)

    def helper_loss(
        self, network: str, output: GeneratorOutput, batch: Mapping[str, Any], draws: Draws, *, step: int
    ) -> Tensor:
        """Loss of a network that helps the generator, on what the generator made of a batch; it is detached."""
        now = TrainingStep(batch["lr"], batch["hr"], output.sr, output.z0, output.routing, draws, step)
        return self.helpers[network].loss(now)

    def _of_images(self, distance: Callable[[Tensor, Tensor], Tensor], step: TrainingStep) -> Tensor:
        return distance(step.sr.float(), step.hr)

    def _of_latents(self, loss: Callable[..., Tensor], aimed: bool, step: TrainingStep) -> Tensor:
        """A network's loss on the generated latents and, if it aims at them, on those of the HR images."""
        real = {}
        if aimed:
            with torch.no_grad(), active_adapters(self.base, None):
                real["real"] = self.generator.encode(pad_to_multiple(step.hr, self.generator.base.multiple))
        return loss(step.z0, draws=step.draws, **real)

    def _balance(self, step: TrainingStep) -> Tensor:
        adapters, routing, severity = self.generator.adapters, step.routing, step.severity
        assert adapters is not None
        assert routing is not None
        assert severity is not None
        return adapters.router.balance_loss(routing, severity)


def known_severity(batch: Mapping[str, Any], estimated: Tensor) -> Tensor:
    """Severities (B,): the true ones of images that were degraded here (NaN for others), else the estimated ones."""
    true = batch.get("severity")
    return estimated if true is None else torch.where(true.isnan(), estimated, true.to(estimated))
