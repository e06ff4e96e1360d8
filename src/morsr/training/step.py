"""Which network moves when: one step of the generator, then one of each network that helps it.

Nothing here knows Lightning. Backward pass and optimizer step are handed in, so the module runs this under any strategy
and precision, and a benchmark runs it with plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from morsr.errors import ConfigError, TrainingError
from morsr.models.draws import Draws
from morsr.models.generator import GeneratorOutput
from morsr.training.objective import Objective

Backward = Callable[[Tensor, bool], None]
"""Called with a loss, and whether gradients are averaged over devices now (False for all but the last part)."""
Update = Callable[["Network"], None]


@dataclass(eq=False)
class Network:
    """One of the alternating networks: its name, what it trains, its optimizer and its learning rate's schedule."""

    name: str
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


@contextmanager
def toggled(networks: Sequence[Network], active: Network) -> Iterator[None]:
    """Let one network alone take gradients inside a ``with`` block; afterwards all have their own setting again.

    A loss of the generator runs through the discriminator's heads: without this they would collect its gradient.
    """
    others = [parameter for network in networks if network is not active for parameter in network.parameters]
    before = [parameter.requires_grad for parameter in others]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(others, before, strict=True):
            parameter.requires_grad_(flag)


@dataclass
class StepReport:
    """What one iteration did.

    Attributes:
        terms: unweighted terms of the generator by name, then the losses of the other networks by theirs.
        total: the generator's weighted sum.
        norms: norm of each network's gradient before clipping.
        outputs: the generator's passes over the parts of the batch, detached.
        skipped: networks whose step was left out because a gradient was not finite.
        task_share: size of the router's gradient from all other terms over that plus the balance's.
    """

    terms: dict[str, Tensor]
    total: Tensor
    outputs: list[GeneratorOutput]
    norms: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    task_share: Tensor | None = None

    def values(self, step: int) -> dict[str, Tensor]:
        """What is logged, by name, as means over devices.

        Under "step" loggers and names of checkpoints find the generator's steps so far, without those left out. The
        term psnr is lowered as −PSNR and shown as PSNR.
        """
        terms = {name: -value if name == "psnr" else value for name, value in self.terms.items()}
        found: dict[str, Any] = {"train/loss": self.total, **{f"train/{name}": one for name, one in terms.items()}}
        found |= {"step": float(step), **{f"watch/grad_norm_{name}": value for name, value in self.norms.items()}}
        found |= {} if self.task_share is None else {"watch_routing/task_gradient_share": self.task_share}
        found |= {f"watch/skipped_{name}": 1.0 for name in self.skipped}
        stacked = torch.stack([torch.as_tensor(value).to(self.total) for value in found.values()])
        return dict(zip(found, mean_over_devices(stacked).unbind(), strict=True))


class OneStepPhase:
    """Alternates generator, score network and discriminator over the parts of a batch.

    Args:
        objective: the losses.
        networks: the generator first.
        backward: runs one backward pass.
        update: steps one network's optimizer.
        accumulate: parts that a batch is split into; their gradients add up to the whole batch's.
        clip: largest norm of each network's gradient; 0 leaves it as it is.
        max_skipped: steps in a row that may be left out, per network, before the run stops.
    """

    def __init__(
        self,
        objective: Objective,
        networks: Sequence[Network],
        *,
        backward: Backward,
        update: Update,
        accumulate: int = 1,
        clip: float = 1.0,
        max_skipped: int = 10,
    ) -> None:
        self.objective, self.networks = objective, list(networks)
        self.backward, self.update = backward, update
        self.accumulate, self.clip, self.max_skipped = accumulate, clip, max_skipped
        self._most = 0  # images of the largest batch so far
        self.skipped_in_a_row = dict.fromkeys((network.name for network in networks), 0)

    def run(self, batch: Mapping[str, Any], draws: Draws, *, step: int) -> StepReport:
        """One generator step on a batch, then one step of every helper whose term has started.

        Args:
            batch: lr (B, 3, h, w) and hr (B, 3, H, W) in [0, 1], perhaps with "score_lr"; see `Objective`.
            draws: random numbers of the batch.
            step: generator steps done so far.

        Raises:
            TrainingError: too many steps in a row had gradients that are not finite.
            ConfigError: fewer images than parts in every batch so far.
        """
        parts = self._parts(len(batch["lr"]))
        generator, *helpers = self.networks
        with toggled(self.networks, generator):
            report = self._generator_pass(batch, draws, parts, step)
            self._finish(generator, report)
        if generator.name in report.skipped:
            return report  # the latents of such a step would only carry the damage on
        for network in helpers:
            if step >= self.objective.helpers[network.name].start:
                with toggled(self.networks, network):
                    self._helper_pass(network, batch, draws, parts, report, step)
                    self._finish(network, report)
        return report

    def _parts(self, count: int) -> list[slice]:
        self._most = max(self._most, count)
        if self._most < self.accumulate:
            raise ConfigError(
                f"accumulate={self.accumulate}: the batch has {count} images only, one per part is needed"
            )
        parts = min(self.accumulate, count)  # the last batch of an epoch may be smaller
        edges = [count * index // parts for index in range(parts + 1)]
        return [slice(first, last) for first, last in pairwise(edges)]

    def _generator_pass(self, batch: Mapping[str, Any], draws: Draws, parts: Sequence[slice], step: int) -> StepReport:
        count, adapters = len(batch["lr"]), self.objective.generator.adapters
        router = [one for one in adapters.router.parameters() if one.requires_grad] if adapters is not None else []
        losses, outputs, pulls = [], [], []
        for part in parts:
            images = {name: batch[name][part] for name in ("lr", "hr", "score_lr", "severity") if name in batch}
            share = (part.stop - part.start) / count
            loss = self.objective.generator_loss(images, draws[part], step=step)
            if "balance" in loss.terms and router:
                pull = torch.autograd.grad(loss.terms["balance"], router, retain_graph=True, allow_unused=True)
                pulls.append(_flat(pull, router) * share * self.objective.terms["balance"][0].at(step))
            self.backward(loss.total * share, part is parts[-1])
            terms = {name: value.detach() * share for name, value in loss.terms.items()}
            losses.append((terms, loss.total.detach() * share))
            outputs.append(_detached(loss.output))
        terms = {name: torch.stack([part[name] for part, _ in losses]).sum() for name in losses[0][0]}
        report = StepReport(terms, torch.stack([total for _, total in losses]).sum(), outputs)
        if pulls:
            balance = mean_over_devices(torch.stack(pulls).sum(0))
            task = _flat([parameter.grad for parameter in router], router) - balance
            report.task_share = task.norm() / (task.norm() + balance.norm()).clamp_min(1e-30)
        return report

    def _helper_pass(
        self,
        network: Network,
        batch: Mapping[str, Any],
        draws: Draws,
        parts: Sequence[slice],
        report: StepReport,
        step: int,
    ) -> None:
        count, values = len(batch["lr"]), []
        for part, made in zip(parts, report.outputs, strict=True):
            share = (part.stop - part.start) / count
            images = {name: batch[name][part] for name in ("lr", "hr")}
            loss = self.objective.helper_loss(network.name, made, images, draws[part], step=step)
            self.backward(loss * share, part is parts[-1])
            values.append(loss.detach() * share)
        report.terms[network.name] = torch.stack(values).sum()

    def _finish(self, network: Network, report: StepReport) -> None:
        """Clip and step one network, or leave its step out where the gradient is not finite."""
        name, gradients = network.name, [one.grad for one in network.parameters if one.grad is not None]
        report.norms[name] = norm = nn.utils.get_total_norm(gradients)
        finite = bool(norm.isfinite())  # gradients are the same on all devices by now, so all decide alike
        if finite:
            if self.clip:
                nn.utils.clip_grads_with_norm_(network.parameters, self.clip, norm)
            self.update(network)
            network.scheduler.step()
        network.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.skipped_in_a_row[name] = 0
            return
        report.skipped.append(name)
        self.skipped_in_a_row[name] += 1
        if self.skipped_in_a_row[name] >= self.max_skipped:
            raise TrainingError(
                f"the gradient of the {name} was not finite in {self.skipped_in_a_row[name]} steps in a row; its "
                "weights are those of the last good step. Lower the learning rate or the weight of the newest loss "
                "term, or train in float32 to see whether the precision is to blame, from the last checkpoint on"
            )


def mean_over_devices(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(one) if gradient is None else gradient).flatten() for gradient, one in pairs])


def _detached(output: GeneratorOutput) -> GeneratorOutput:
    """The same without its graph, so that whoever reads it later does not keep that alive."""
    routing = output.routing.detach() if output.routing is not None else None
    return output._replace(sr=output.sr.detach(), z0=output.z0.detach(), routing=routing)
