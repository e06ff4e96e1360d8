"""The alternating networks: who moves, whose gradients flow where, and how steps are counted."""

import csv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import training_twins as twins
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from morsr.errors import ConfigError, TrainingError
from morsr.training.optim import check_trainer, check_turns


@pytest.fixture
def module(small_base):
    """All losses."""
    return twins.build(small_base, loss={**twins.ALL_LOSSES, "gan": {"weight": 0.1, "width": 8}})


def gradients(parameters: list[torch.nn.Parameter]) -> float:
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)


def test_max_steps_counts_generator_updates_only(module, tmp_path):
    class Count(L.Callback):
        updates: dict[int, int] = {}  # noqa: RUF012

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            place = next(i for i, n in enumerate(pl_module.phase.networks) if n.optimizer is optimizer)
            self.updates[place] = self.updates.get(place, 0) + 1

    count = Count()
    trainer = twins.fit(module, tmp_path, 5, callbacks=[count], enable_checkpointing=False)
    assert count.updates == {0: 5, 1: 5, 2: 5}
    assert trainer.global_step == 5
    assert [int(network.scheduler.last_epoch) for network in module.phase.networks] == [5, 5, 5]


def test_each_loss_reaches_its_own_network_alone(module):
    trained = module.objective.trained()
    collected: dict[str, dict[str, float]] = {}
    phase = twins.plain_phase(module)

    def record(network: Any) -> None:
        collected[network.name] = {name: gradients(parameters) for name, parameters in trained.items()}
        network.optimizer.step()

    phase.update = record
    phase.run(twins.batch(), twins.draws(), step=0)
    assert collected.keys() == trained.keys()
    for source, sizes in collected.items():
        for name, size in sizes.items():
            assert (size > 0) == (name == source), f"{source} gave {name} a gradient of {size}"


def test_parts_of_a_batch_add_up_to_its_gradient(small_base):
    # The running shares of the balance loss take in one part after the other: it is left out here.
    found = []
    for accumulate in (1, 3):
        module = twins.build(small_base, loss={**twins.ALL_LOSSES, "balance": 0.0})
        phase = twins.plain_phase(module, accumulate=accumulate, clip=0.0)
        values: dict[str, list[torch.Tensor]] = {}

        def record(network: Any, values: dict[str, list[torch.Tensor]] = values) -> None:
            values[network.name] = [p.grad.clone() for p in network.parameters if p.grad is not None]
            network.optimizer.step()

        phase.update = record
        report = phase.run(twins.batch(4), twins.draws(4), step=0)
        found.append((values, report))
    (whole, one), (parts, three) = found
    for name, grads in whole.items():
        for ours, expected in zip(parts[name], grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in one.terms.items():
        torch.testing.assert_close(three.terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(torch.cat([made.sr for made in three.outputs]), one.outputs[0].sr, rtol=1e-5, atol=1e-6)


def test_a_smaller_last_batch_is_split_into_fewer_parts(small_base):
    phase = twins.plain_phase(twins.build(small_base), accumulate=2)
    with pytest.raises(ConfigError, match="accumulate=2"):
        phase.run(twins.batch(1), twins.draws(1), step=0)
    for step, count in enumerate((2, 1)):
        assert len(phase.run(twins.batch(count), twins.draws(count), step=step).outputs) == count


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}, "ReduceLROnPlateau"),
        ({"optimizers": {"generator": torch.optim.LBFGS}}, "optimizers.generator"),
    ],
)
def test_optimizers_and_schedules_that_do_not_go_step_by_step_are_refused(settings, told, small_base):
    with pytest.raises(ConfigError, match=told):
        twins.build(small_base, **settings).build_networks()


def test_a_rate_of_zero_is_one(small_base):
    module = twins.build(small_base, loss={"gan": {"weight": 1.0, "lr": 0.0}})
    rates = {one.name: one.optimizer.param_groups[0]["lr"] for one in module.build_networks()}
    assert rates == {"generator": 1e-2, "discriminator": 0.0}


def test_terms_wait_for_their_start_and_their_networks_rest(small_base):
    loss = {"l2": 1.0, "vsd": {"weight": 2.0, "start": 1}, "gan": {"weight": 1.0, "start": 2, "ramp": 2}}
    module = twins.build(small_base, loss=loss)
    phase = twins.plain_phase(module)
    reports = [phase.run(twins.batch(), twins.draws(step=step), step=step) for step in range(3)]
    assert [sorted(set(r.terms) - {"l2", "balance"}) for r in reports] == [
        [], ["score", "vsd"], ["discriminator", "gan", "score", "vsd"],
    ]  # fmt: skip
    assert [list(r.norms) for r in reports] == [
        ["generator"], ["generator", "score"], ["generator", "score", "discriminator"],
    ]  # fmt: skip
    last = reports[2]
    weights = {"l2": 1.0, "vsd": 2.0, "gan": 0.5, "balance": 1.0}
    expected = sum(weight * last.terms[name] for name, weight in weights.items())
    torch.testing.assert_close(last.total, expected)


def test_loggers_count_generator_steps_where_one_is_left_out(module, tmp_path):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and not pl_module.phase.skipped_in_a_row["generator"]:
                batch["hr"].fill_(float("nan"))

    logger = CSVLogger(tmp_path)
    twins.fit(module, tmp_path, 3, callbacks=[Spoil()], logger=logger, log_every_n_steps=1, enable_checkpointing=False)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [1, 1, 2, 3]


def test_a_step_that_is_not_finite_is_left_out_and_counted(module):
    phase = twins.plain_phase(module, max_skipped=3)
    phase.run(twins.batch(), twins.draws(), step=0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    bad = twins.batch()
    bad["hr"] = bad["hr"] * float("nan")
    report = phase.run(bad, twins.draws(), step=1)
    assert report.skipped == ["generator"]
    torch.testing.assert_close(dict(module.named_parameters()), before, rtol=0, atol=0)
    assert phase.skipped_in_a_row == {"generator": 1, "score": 0, "discriminator": 0}
    phase.run(twins.batch(), twins.draws(), step=1)
    assert phase.skipped_in_a_row["generator"] == 0
    for _ in range(2):
        phase.run(bad, twins.draws(), step=2)
    with pytest.raises(TrainingError, match="generator was not finite in 3 steps in a row"):
        phase.run(bad, twins.draws(), step=2)


@pytest.mark.parametrize(
    ("strategy", "networks", "works"),
    [
        (DDPStrategy(), 3, False),
        (DDPStrategy(), 1, True),
        (DDPStrategy(find_unused_parameters=True), 3, True),
        (SingleDeviceStrategy(), 3, True),
        (FSDPStrategy(), 1, False),
    ],
)
def test_strategies_that_would_train_wrongly_are_refused(strategy, networks, works):
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[], precision="32-true", strategy=strategy)
    with nullcontext() if works else pytest.raises(ConfigError):
        check_trainer(trainer)
        check_turns(trainer, networks=networks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scores_come_from_the_whole_crops(module, accumulate):
    phase = twins.plain_phase(module, accumulate=accumulate)
    whole = torch.rand(2, 3, 24, 24)
    report = phase.run({**twins.batch(), "score_lr": whole}, twins.draws(), step=0)
    scores = torch.cat([made.scores.scores for made in report.outputs])
    torch.testing.assert_close(scores, module.generator.estimator(whole).scores)


def test_calibration_scores_the_whole_crops(module, tmp_path):
    class Windows(twins.Pairs):
        def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
            return {**batch, "score_lr": torch.full((len(batch["lr"]), 3, 16, 16), 0.5)}

    twins.fit(module, tmp_path, 1, data=Windows())
    flat = module.generator.estimator(torch.full((1, 3, 16, 16), 0.5)).scores[0]
    torch.testing.assert_close(module.generator.adapters.router.mean, flat)
