"""Training through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from morsr.errors import ConfigError
from morsr.models.generator import OneStepGenerator


class CompiledTraining(Callback):
    """Runs UNet, encoder and decoder through torch.compile in the generator's passes that are trained on.

    Training crops have one size, for which the networks are compiled once. Losses, score network, discriminator and
    validation, which look into the networks or have images of many sizes, use them as they are. In a compiled pass all
    ranks run masked, so that neither the routing nor `budget_dropout` changes a shape. The first step takes minutes.

    Args:
        backend: of torch.compile.

    Raises:
        ConfigError: in a run with activation checkpointing, or of a module without a one-step generator.
    """

    def __init__(self, *, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self._generator: OneStepGenerator | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generator = getattr(pl_module, "generator", None)
        if not isinstance(generator, OneStepGenerator):
            raise ConfigError(f"CompiledTraining: {type(pl_module).__name__} has no generator to compile; leave it out")
        if any(getattr(part, "gradient_checkpointing", False) for part in generator.backbone.modules()):
            raise ConfigError("CompiledTraining: compiled networks recompute nothing; set model.checkpointing to false")
        plain = generator.forward
        compiled = {
            network: torch.compile(network.forward, backend=self.backend, dynamic=False)
            for network in generator.networks
        }

        def forward(*args: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **options)
            with _replaced(compiled), _masked(generator):
                return plain(*args, **options)

        self._generator = generator
        generator.forward = forward  # type: ignore[method-assign]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._generator is not None:
            del self._generator.forward  # its class's is found again
            self._generator = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for network, forward in forwards.items():
        network.forward = forward
    try:
        yield
    finally:
        for network in forwards:
            del network.forward


@contextmanager
def _masked(generator: OneStepGenerator) -> Iterator[None]:
    context = generator.context
    if context is None:
        yield
        return
    before, context.compute = context.compute, "masked"
    try:
        yield
    finally:
        context.compute = before
