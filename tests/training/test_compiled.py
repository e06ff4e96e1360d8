"""Compiled training steps learn what plain ones learn, and leave nothing compiled behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from training_twins import ALL_LOSSES, build, fit

from morsr.errors import ConfigError
from morsr.training.callbacks import CompiledTraining

STEPS = 3


class Backend:
    """In place of a compiler: runs what was traced as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return graph.forward(*arguments)

        return run


class Calls(L.Callback):
    """Calls of the backend up to the end of each validation."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.seen = backend, []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(self.backend.calls)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(self.backend.calls)


def assert_plain(module: Any) -> None:
    generator = module.generator
    assert not any("forward" in vars(network) for network in (generator, *generator.networks))
    assert generator.context.compute == "auto"


def learned(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{"budget_dropout": 1.0}, {"loss": ALL_LOSSES}], ids=["budgets", "three networks"])
def test_compiled_steps_learn_what_plain_ones_learn(settings: dict[str, Any], small_base: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain, compiled, backend = build(small_base, **settings), build(small_base, **settings), Backend()
    fit(plain, tmp_path / "plain", STEPS)
    fit(compiled, tmp_path / "compiled", STEPS, callbacks=[CompiledTraining(backend=backend)])
    assert backend.calls >= 3 * STEPS
    for name, value in learned(plain).items():
        torch.testing.assert_close(learned(compiled)[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_validation_runs_plain_and_so_does_what_comes_after(small_base: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    module, backend = build(small_base), Backend()
    watch = Calls(backend)
    fit(
        module, tmp_path, STEPS, callbacks=[CompiledTraining(backend=backend), watch],
        limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1,
    )  # fmt: skip
    per_step = backend.calls // STEPS
    assert per_step >= 3
    # Before training, and after every step.
    assert watch.seen == [calls for step in range(STEPS + 1) for calls in (step * per_step,) * 2]
    assert backend.graphs == per_step, "every graph was made once"
    assert_plain(module)


def test_a_run_that_fails_leaves_nothing_compiled(small_base: Path, tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop here")

    module = build(small_base)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, tmp_path, STEPS, callbacks=[CompiledTraining(backend="eager"), Fails()])
    assert_plain(module)


def test_what_cannot_be_compiled_is_told(small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.checkpointing"):
        fit(build(small_base, checkpointing=True), tmp_path, 1, callbacks=[CompiledTraining(backend="eager")])
    callback: Any = CompiledTraining(backend="eager")
    with pytest.raises(ConfigError, match="no generator"):
        callback.on_train_start(None, L.LightningModule())
