"""Two processes over gloo train all three networks as one process does on the joined batch."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import training_twins as twins
from torch.utils.data import DataLoader

from morsr.evaluation.callback import ScoreDump
from morsr.models.generator import OneStepConfig

STEPS = 2


class Joined(twins.Pairs):
    """Four images a step in all: two for each of two processes, the first process's first."""

    def train_dataloader(self) -> DataLoader:
        count, rank = 4 // self.trainer.world_size, self.trainer.global_rank
        places = [step * 4 + rank * count + index for step in range(STEPS) for index in range(count)]
        return DataLoader([self.pair(place) for place in places], batch_size=count, collate_fn=self.collate)


class Record(L.Callback):
    """Keeps gradients by network and step, and the terms of every step; each process writes its own file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gradients, self.terms = folder, [], []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # AdamW's first steps are the gradients' signs: rounding of those near zero would drive the two runs apart.
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["eps"] = 1e-2

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        network = next(n for n in pl_module.phase.networks if n.optimizer is optimizer)
        self.gradients.append([p.grad.clone() for p in network.parameters if p.grad is not None])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        logged = {
            name: value
            for name, value in trainer.logged_metrics.items()
            if name.startswith(("train/", "watch_routing/"))
        }
        self.terms.append({name: value.detach().clone() for name, value in logged.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        router = {
            name: value for name, value in pl_module.generator.named_buffers() if name.endswith((".mean", ".std"))
        }
        kept = {"gradients": self.gradients, "terms": self.terms, "standardization": router}
        kept["timestep"] = pl_module.generator.one_step.timestep
        torch.save(kept, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def train(base: Path, folder: Path, **settings: Any) -> None:
    auto = OneStepConfig(timestep="auto", scale_input=True)
    module = twins.build(base, loss=twins.ALL_LOSSES, lr=1e-3, one_step=auto)
    twins.fit(
        module, folder, STEPS, callbacks=[Record(folder)], data=Joined(), enable_checkpointing=False,
        use_distributed_sampler=False, log_every_n_steps=1, **settings,
    )  # fmt: skip


def test_losses_and_gradients_equal_the_joined_batch(small_base, tmp_path):
    train(small_base, tmp_path)
    train(small_base, tmp_path, devices=2, strategy="ddp_fork_find_unused_parameters_true")
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one["gradients"]) == len(first["gradients"]) == 3 * STEPS
    for place, expected in enumerate(one["gradients"]):
        for mine, other, whole in zip(first["gradients"][place], second["gradients"][place], expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0, msg="processes hold different gradients")
            torch.testing.assert_close(
                mine, whole, rtol=1e-3, atol=1e-6, msg=lambda text, place=place: f"update {place}: {text}"
            )
    for step, terms in enumerate(one["terms"]):
        assert {"train/vsd", "train/gan", "train/score", "train/discriminator", "train/balance"} <= set(terms)
        for name, whole in terms.items():
            for process in (first, second):  # the logged terms are means over processes
                torch.testing.assert_close(
                    process["terms"][step][name], whole, rtol=1e-3, atol=1e-5, msg=f"{name} {step}"
                )
    assert first["timestep"] == second["timestep"] == one["timestep"]
    torch.testing.assert_close(first["standardization"], one["standardization"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second["standardization"], first["standardization"], rtol=0, atol=0)


class OneImage(twins.Pairs):
    """A single image, which the first process counts."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{**self.pair(100), "repeated": self.trainer.global_rank > 0}], collate_fn=self.collate)

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().collate(pairs), "repeated": [pair["repeated"] for pair in pairs]}


class Means(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(dict(trainer.callback_metrics), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_a_process_whose_images_others_count_validates_with_them(small_base, tmp_path):
    module = twins.build(small_base, val_metrics=["psnr"])
    module.weights_file = "none is loaded: the module as it is"
    for devices in (1, 2):
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", logger=False,
            callbacks=[Means(tmp_path), ScoreDump()], enable_progress_bar=False, default_root_dir=tmp_path,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.validate(module, datamodule=OneImage(), verbose=False)
    one, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for process in both:
        torch.testing.assert_close(process["val/psnr"], one["val/psnr"])
