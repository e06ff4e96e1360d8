"""The alternating networks: who moves, whose gradients flow where, and how steps are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import training_twins as twins


@pytest.fixture
def module(small_base: Path) -> Any:
    return twins.build(small_base, loss=twins.ALL_LOSSES)


def gradients(parameters: list[torch.nn.Parameter]) -> float:
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)


def test_max_steps_counts_generator_updates_only(module: Any, tmp_path: Path) -> None:
    class Count(L.Callback):
        updates: dict[int, int] = {}  # noqa: RUF012

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            place = next(i for i, n in enumerate(pl_module.phase.networks) if n.optimizer is optimizer)
            self.updates[place] = self.updates.get(place, 0) + 1

    count = Count()
    trainer = twins.fit(module, tmp_path, 20, callbacks=[count], enable_checkpointing=False)
    assert count.updates == {0: 20, 1: 20, 2: 20}
    assert trainer.global_step == 20
    assert [int(network.scheduler.last_epoch) for network in module.phase.networks] == [20, 20, 20]


@pytest.mark.parametrize("source", ["generator", "score", "discriminator"])
def test_each_loss_reaches_its_own_network_alone(module: Any, source: str) -> None:
    trained = module.objective.trained()
    collected: dict[str, dict[str, float]] = {}
    phase = twins.plain_phase(module)

    def record(network: Any) -> None:
        collected[network.name] = {name: gradients(parameters) for name, parameters in trained.items()}
        network.optimizer.step()

    phase.update = record
    phase.run(twins.batch(), twins.draws(), step=0)
    for name, size in collected[source].items():
        assert (size > 0) == (name == source), f"{source} gave {name} a gradient of {size}"
