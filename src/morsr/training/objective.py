"""All losses of one-step training as one object that needs no trainer: what each network minimises.

generator       L2 + LPIPS + … (image terms) + λ1 VSD + λ2 GAN + balance
score           its noise prediction on the generated latents
discriminator   hinge loss on generated and real latents, or images
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters import active_adapters, adapter_parameters
from morsr.errors import ConfigError
from morsr.models.discriminator import Discriminator, DiscriminatorConfig, ImageDiscriminator, build_discriminator
from morsr.models.draws import Draws
from morsr.models.features import encoder_features
from morsr.models.generator import GeneratorOutput, OneStepGenerator, pad_to_multiple
from morsr.models.losses import RestorationLoss, Weight
from morsr.models.score_network import ScoreConfig, ScoreNetwork, Teacher

NETWORK_TERMS = ("vsd", "csd", "gan", "balance")
"""Terms beside those of `RestorationLoss`."""

Part = Callable[[str], AbstractContextManager[Any]]


class GeneratorLoss(NamedTuple):
    """Unweighted terms by name, their weighted sum, and the pass that they were taken from."""

    terms: dict[str, Tensor]
    total: Tensor
    output: GeneratorOutput


class Objective:
    """The generator's terms and the losses of the networks that help it.

    Args:
        generator: the one-step generator; score network and discriminator share its backbone.
        loss: weights by term, each a number or {weight, start, ramp}: those of `RestorationLoss`, and "vsd" and "csd"
            (variational and classifier score distillation), "gan" and "balance" (1 unless given).
        score: settings of the distillation; None: the defaults, where "vsd" or "csd" asks for it.
        discriminator: settings of the discriminator; None: the defaults, where "gan" asks for it.

    Raises:
        ConfigError: an unknown term, settings of a network that no term asks for, or parameters to be trained that the
            base needs as they are to judge the generator.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        loss: Mapping[str, Any] | None = None,
        *,
        score: ScoreConfig | None = None,
        discriminator: DiscriminatorConfig | None = None,
    ) -> None:
        self.generator, self.backbone = generator, generator.backbone
        given = dict(loss or {})
        beside = {name: given.pop(name) for name in NETWORK_TERMS if name in given}
        self.weights = {name: Weight.of(value, name=name) for name, value in {"balance": 1.0, **beside}.items()}
        known = ("l1", "l2", "charbonnier", "psnr", "lpips", "features", "lpips_folder")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"loss: unknown terms {', '.join(unknown)}; expected {', '.join((*known, *NETWORK_TERMS))}"
            )
        self.restoration = RestorationLoss(**given, feature_network=self._features)
        wants_score, wants_teacher, wants_heads = (bool(self.weights.get(n)) for n in ("vsd", "csd", "gan"))
        if score is not None and not (wants_score or wants_teacher):
            raise ConfigError("score: settings without effect; give loss.vsd or loss.csd a weight")
        if discriminator is not None and not wants_heads:
            raise ConfigError("discriminator: settings without effect; give loss.gan a weight")
        self.teacher: Teacher | None = None
        self.score: ScoreNetwork | None = None
        if wants_score:
            self.teacher = self.score = ScoreNetwork(self.backbone, score or ScoreConfig())
        elif wants_teacher:
            self.teacher = Teacher(self.backbone, score or ScoreConfig())
        self.discriminator: Discriminator | ImageDiscriminator | None = None
        if wants_heads:
            self.discriminator = build_discriminator(self.backbone, discriminator or DiscriminatorConfig())
        self.part: Part = lambda name: nullcontext()

    def _features(self, images: Tensor) -> list[Tensor]:
        with active_adapters(self.backbone, None):
            return encoder_features(self.backbone, images)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by network: "generator", and "score" and "discriminator" where there are any."""
        networks = {"generator": adapter_parameters(self.backbone, "generator")}
        if self.score is not None:
            networks["score"] = self.score.parameters()
        if self.discriminator is not None:
            networks["discriminator"] = list(self.discriminator.parameters())
        return networks

    def describe(self) -> str:
        """One line for the log: which terms count, and what stands in for LPIPS where it is off."""
        weights = {**self.restoration.weights, **self.weights}
        adapters = self.generator.adapters
        if adapters is None or not adapters.is_routed:
            weights.pop("balance")
        parts = [f"{name} {weight}" for name, weight in weights.items() if weight]
        if not weights["lpips"]:
            stand_in = "the perceptual term uses features of the frozen base" if weights["features"] else "none instead"
            parts.append(f"LPIPS off ({stand_in})")
        return f"losses: {', '.join(parts)}"

    def first_step(self, network: str) -> int:
        """Generator step from which a network moves: the helpers rest until their term starts."""
        return 0 if network == "generator" else self.weights["vsd" if network == "score" else "gan"].start

    def generator_loss(self, batch: Mapping[str, Any], draws: Draws, *, step: int) -> GeneratorLoss:
        """Forward pass and all terms that count at this step.

        Args:
            batch: lr (B, 3, h, w) and hr (B, 3, H, W) in [0, 1], and where they are parts of larger images, "context",
                the LR images that the degradation scores are taken from.
            draws: random numbers of these images.
            step: generator step.
        """
        lr, hr = batch["lr"], batch["hr"]
        adapters, noise = self.generator.adapters, None
        if adapters is not None and adapters.is_routed and adapters.router.noise_sigma > 0:
            shape = (len(adapters.layer_names), adapters.config.num_slots)
            noise = draws.normal("router", shape).transpose(0, 1)
        with self.part("generator"):
            output = self.generator(lr, size=(hr.shape[-2], hr.shape[-1]), score_lr=batch.get("context"), noise=noise)
        with self.part("reconstruction"):
            terms = self.restoration(output.sr, hr, step=step)
        total = terms.pop("total")
        for name, compute in self._network_terms(output, draws, batch).items():
            factor = self.weights[name].at(step) if name in self.weights else 0.0
            if factor > 0:
                with self.part(name):
                    terms[name] = compute()
                total = total + factor * terms[name]
        return GeneratorLoss(terms, total, output)

    def _network_terms(
        self, output: GeneratorOutput, draws: Draws, batch: Mapping[str, Any]
    ) -> dict[str, Callable[[], Tensor]]:
        teacher, score, discriminator = self.teacher, self.score, self.discriminator
        adapters, scores, routing = self.generator.adapters, output.scores, output.routing
        terms: dict[str, Callable[[], Tensor]] = {}
        if score is not None:
            terms["vsd"] = lambda: score.variational_loss(output.z0, draws)
        if teacher is not None:
            terms["csd"] = lambda: teacher.classifier_loss(output.z0, draws)
        if discriminator is not None:
            seen = output.z0 if discriminator.sees == "latents" else output.sr
            terms["gan"] = lambda: discriminator.generator_loss(seen, draws)
        if adapters is not None and routing is not None and scores is not None:
            terms["balance"] = lambda: adapters.router.balance_loss(routing, batch.get("severity", scores.severity))
        return terms

    def helper_loss(self, network: str, output: GeneratorOutput, hr: Tensor, draws: Draws) -> Tensor:
        """Loss of the score network or of the discriminator on what the generator made of a batch; it is detached."""
        if network == "score":
            assert self.score is not None
            return self.score.denoising_loss(output.z0, draws)
        assert self.discriminator is not None
        with torch.no_grad(), active_adapters(self.backbone, None), self.part("encode_real"):
            real = self.generator.encode(pad_to_multiple(hr, self.generator.multiple))
            if self.discriminator.sees == "image":
                # As the autoencoder shows them: its traces are on both sides then, and tell nothing.
                real = self.generator.decode(real)[..., : hr.shape[-2], : hr.shape[-1]]
        fake = output.z0 if self.discriminator.sees == "latents" else output.sr
        return self.discriminator.loss(fake, real, draws)
