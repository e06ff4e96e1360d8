"""A full disk or a dead worker ends a run with one clear line, and its last checkpoint is whole."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training_twins import run_options

from morsr.adapters import adapter_parameters
from morsr.cli import main
from morsr.training.callbacks import StopBetweenSteps
from morsr.training.checkpoints import read_checkpoint


class Poison(L.Callback):
    """Leaves NaN in the adapters when the last step is done."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            adapter_parameters(pl_module.generator)[0].data.fill_(float("nan"))


class Terminate(L.Callback):
    """Sends SIGTERM while the router is being calibrated."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        estimate = pl_module.generator.estimator.forward
        pl_module.generator.estimator.forward = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), estimate(*a))[1]


class KillWorker(L.Callback):
    """Kills the process that reads the data, after the first checkpoint."""

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 2:
            os.kill(trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(10)  # until torch notices


def options(base: Path, folder: Path, *callbacks: str, steps: int = 8) -> list[str]:
    """Some steps of all three networks, with a checkpoint after every second one."""
    checkpoints = {"dirpath": str(folder / "out"), "every_n_train_steps": 2, "save_last": True,
                   "save_on_exception": True, "filename": "at-{step}", "auto_insert_metric_name": False}  # fmt: skip
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}
    return run_options(
        "tiny/mor_full.yaml", base, samples=100, max_steps=steps, logger=False, default_root_dir=str(folder),
        callbacks=[*({"class_path": one} for one in callbacks), keep],
    )  # fmt: skip


def whole_step(path: Path) -> int:
    """The step of a checkpoint that can be read."""
    checkpoint = read_checkpoint(path)
    assert checkpoint["state_dict"]
    return checkpoint["global_step"]


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(small_base, tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def filling(checkpoint: Any, file: Any) -> None:
        saved.append(file)
        if len(saved) > 2:  # the first checkpoint and its double under the name of the last one
            Path(file).write_bytes(b"half of it") if isinstance(file, (str, Path)) else file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", filling)
    assert main(options(small_base, tmp_path)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: ")]
    assert "the checkpoint could not be written" in line
    assert "No space left" in line
    assert whole_step(tmp_path / "out" / "last.ckpt") == whole_step(tmp_path / "out" / "at-2.ckpt") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["at-2.ckpt", "last.ckpt"]


def test_adapters_that_have_gone_nan_leave_the_file_before(small_base, tmp_path, capsys):
    callbacks = ("test_accidents.Poison", "morsr.training.callbacks.AdapterCheckpoint")
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(b"of an earlier run")
    assert main(options(small_base, tmp_path, *callbacks, steps=2)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: ")]
    assert "hold NaN or infinity" in line
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapters.safetensors"]
    assert file.read_bytes() == b"of an earlier run"


def test_sigterm_in_the_calibration_stops_at_once_and_says_so(small_base, tmp_path, capsys):
    assert main(options(small_base, tmp_path, "test_accidents.Terminate")) == 143
    assert "morsr: stopped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is saved before the first step"


def test_a_dead_worker_is_one_line(small_base, tmp_path, capsys):
    assert main([*options(small_base, tmp_path, "test_accidents.KillWorker"), "--data.num_workers=1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: ")]
    assert "DataLoader worker (pid" in line
    assert whole_step(tmp_path / "out" / "last.ckpt") == 2


@pytest.mark.parametrize(
    ("processes", "error", "saves"), [(1, OSError(), True), (2, OSError(), False), (2, KeyboardInterrupt(), True)]
)
def test_an_error_of_one_process_alone_saves_nothing(processes, error, saves):
    keep, stop = ModelCheckpoint(save_on_exception=True), StopBetweenSteps()
    stop.steps = 1
    trainer: Any = SimpleNamespace(world_size=processes, checkpoint_callbacks=[keep])
    stop.on_exception(trainer, None, error)  # type: ignore[arg-type]
    assert keep.save_on_exception == saves  # where the others would be waited for
