"""All losses of one-step training as one object that needs no trainer: what each network minimises.

generator       L2 + LPIPS + … (image terms) + λ1 VSD + λ2 GAN + balance
score           its noise prediction on the generated latents
discriminator   hinge loss on generated and real latents
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters import active_adapters, adapter_parameters
from morsr.errors import ConfigError
from morsr.models.discriminator import Discriminator
from morsr.models.draws import Draws
from morsr.models.generator import GeneratorOutput, OneStepGenerator, pad_to_multiple
from morsr.models.losses import Losses, LossTerm, RestorationLoss, TrainingStep, Weight, encoder_features
from morsr.models.score_network import ScoreNetwork, Teacher

NETWORK_TERMS = ("vsd", "csd", "gan", "balance")
"""Terms beside those of `RestorationLoss`."""


class GeneratorLoss(NamedTuple):
    """Unweighted terms by name, their weighted sum, and the pass that they were taken from."""

    terms: dict[str, Tensor]
    total: Tensor
    output: GeneratorOutput


class Helper(NamedTuple):
    """A network that helps the generator.

    parameters: what it trains. lr: None for the generator's. start: generator step from which it moves.
    term: the user's own loss term that it belongs to.
    """

    parameters: list[nn.Parameter]
    lr: float | None
    start: int
    term: LossTerm | None = None


class Objective:
    """The generator's terms and the losses of the networks that help it.

    Args:
        generator: the one-step generator; score network and discriminator share its base.
        losses: the terms; None: l2 and the balance.
        lpips: see `RestorationLoss`.

    Raises:
        ConfigError: no term with a weight.
    """

    def __init__(
        self, generator: OneStepGenerator, losses: Losses | None = None, *, lpips: nn.Module | None = None
    ) -> None:
        self.generator, self.base = generator, generator.base
        losses = losses or Losses()
        self.extra = dict(losses.extra)
        self.weights = {name: getattr(losses, name) or Weight(weight=0) for name in NETWORK_TERMS}
        self.weights |= {name: term.schedule for name, term in self.extra.items()}
        self.restoration = RestorationLoss(losses, feature_network=self._features, lpips=lpips)
        image_terms = any(self.restoration.weights.values())
        if not image_terms and not any(self.weights[name] for name in self.weights if name != "balance"):
            raise ConfigError("losses: expected at least one term with a weight above 0, got none")
        if taken := sorted(self.extra.keys() & {*self.restoration.weights, *NETWORK_TERMS}):
            raise ConfigError(f"losses.extra.{taken[0]}: this name is a term of morsr's; choose another")
        self.teacher: Teacher | None = None
        self.score: ScoreNetwork | None = None
        if losses.vsd:
            self.teacher = self.score = ScoreNetwork(self.base, losses.vsd)
        elif losses.csd:
            self.teacher = Teacher(self.base, losses.csd)
        self.discriminator: Discriminator | None = None
        if losses.gan:
            self.discriminator = Discriminator(self.base, losses.gan)
        for term in self.extra.values():
            term.setup(self.base)

    def _features(self, images: Tensor) -> list[Tensor]:
        with active_adapters(self.base, None):
            return encoder_features(self.base, images)

    def helpers(self) -> dict[str, Helper]:
        """The networks that help the generator: "score" and "discriminator", and those of the user's own terms."""
        found: dict[str, Helper] = {}
        if self.score is not None:
            found["score"] = Helper(self.score.parameters(), self.score.config.lr, self.weights["vsd"].start)
        if self.discriminator is not None:
            heads = list(self.discriminator.parameters())
            found["discriminator"] = Helper(heads, self.discriminator.config.lr, self.weights["gan"].start)
        for term in self.extra.values():
            found |= {
                name: Helper(parameters, term.lr, term.schedule.start, term)
                for name, parameters in term.trained().items()
            }
        return found

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by network, the generator's first."""
        helpers = {name: helper.parameters for name, helper in self.helpers().items()}
        return {"generator": adapter_parameters(self.base, "generator"), **helpers}

    def generator_loss(self, batch: Mapping[str, Any], draws: Draws, *, step: int) -> GeneratorLoss:
        """Forward pass and all terms that count at this step.

        Args:
            batch: lr (B, 3, h, w) and hr (B, 3, H, W) in [0, 1], and where they are parts of larger images, "score_lr",
                the LR images that the degradation scores are taken from.
            draws: random numbers of these images.
            step: generator step.
        """
        lr, hr = batch["lr"], batch["hr"]
        adapters, noise, keep = self.generator.adapters, None, None
        if adapters is not None and adapters.is_routed and adapters.router.noise_sigma > 0:
            shape = (len(adapters.layer_names), adapters.config.num_slots)
            noise = draws.normal("router", shape).transpose(0, 1)
        if adapters is not None and adapters.is_routed and adapters.config.routed_dropout > 0:
            share = draws.timesteps("routed_dropout", 0, 999) / 1000
            keep = (share >= adapters.config.routed_dropout).float()
        output = self.generator(
            lr, size=(hr.shape[-2], hr.shape[-1]), score_lr=batch.get("score_lr"), noise=noise, keep=keep
        )
        terms = self.restoration(output.sr, hr, step=step)
        total = terms.pop("total")
        for name, compute in self._network_terms(output, draws, batch, step).items():
            factor = self.weights[name].at(step)
            if factor > 0:
                terms[name] = compute()
                total = total + factor * terms[name]
        return GeneratorLoss(terms, total, output)

    def _network_terms(
        self, output: GeneratorOutput, draws: Draws, batch: Mapping[str, Any], step: int
    ) -> dict[str, Callable[[], Tensor]]:
        teacher, score, discriminator = self.teacher, self.score, self.discriminator
        adapters, scores, routing = self.generator.adapters, output.scores, output.routing
        terms: dict[str, Callable[[], Tensor]] = {}
        if score is not None:
            aimed = bool(score.config.target)
            terms["vsd"] = lambda: score.variational_loss(
                output.z0, draws, self._real_latents(batch["hr"]) if aimed else None
            )
        if teacher is not None:
            terms["csd"] = lambda: teacher.classifier_loss(output.z0, draws)
        if discriminator is not None:
            terms["gan"] = lambda: discriminator.generator_loss(output.z0, draws)
        if adapters is not None and routing is not None and scores is not None:
            severity = known_severity(batch, scores.severity)
            terms["balance"] = lambda: adapters.router.balance_loss(routing, severity)
        if self.extra:
            now = TrainingStep(batch["lr"], batch["hr"], output.sr, output.z0, routing, draws, step)
            terms |= {name: functools.partial(term, now) for name, term in self.extra.items()}
        return terms

    def _real_latents(self, hr: Tensor) -> Tensor:
        """Latents of HR images (B, 3, H, W) in [0, 1] by the frozen encoder, without a gradient."""
        with torch.no_grad(), active_adapters(self.base, None):
            return self.generator.encode(pad_to_multiple(hr, self.generator.multiple))

    def helper_loss(
        self, network: str, output: GeneratorOutput, batch: Mapping[str, Any], draws: Draws, *, step: int
    ) -> Tensor:
        """Loss of a network that helps the generator, on what the generator made of a batch; it is detached."""
        hr = batch["hr"]
        if (term := self.helpers()[network].term) is not None:
            now = TrainingStep(batch["lr"], hr, output.sr.detach(), output.z0.detach(), output.routing, draws, step)
            return term.network_loss(network, now)
        if network == "score":
            assert self.score is not None
            return self.score.denoising_loss(output.z0, draws)
        assert self.discriminator is not None
        return self.discriminator.loss(output.z0, self._real_latents(hr), draws)


def known_severity(batch: Mapping[str, Any], estimated: Tensor) -> Tensor:
    """Severities (B,): the true ones of images that were degraded here (NaN for others), else the estimated ones."""
    true = batch.get("severity")
    return estimated if true is None else torch.where(true.isnan(), estimated, true.to(estimated))
