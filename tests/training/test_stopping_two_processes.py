"""Two processes, started by the command line, stop at the same step on a signal to one and go on exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from training_twins import run_options

STEPS = 5


class Stop(L.Callback):
    """Sends SIGTERM to one process in the second step, when only the generator has moved."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        second = optimizer is pl_module.phase.networks[1].optimizer
        if trainer.global_step == 2 and second and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train(base: Path, out: Path, *more: str, stop: Stop | None = None) -> subprocess.CompletedProcess[str]:
    """All three networks on dead leaves, two processes over gloo in a group of their own."""
    callbacks: list[dict[str, Any]] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
         "init_args": {"dirpath": str(out), "save_last": True, "save_on_exception": True, "filename": "at-{step}"}},
    ]  # fmt: skip
    if stop is not None:
        callbacks.append({"class_path": "test_stopping_two_processes.Stop", "init_args": vars(stop)})
    command = [
        sys.executable, "-m", "morsr", *run_options("tiny/mor_full.yaml", base, samples=6, max_steps=STEPS),
        "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true",
        f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.default_root_dir={out}", *more,
    ]  # fmt: skip
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=out.parent, start_new_session=True,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_the_command_trains_in_two_processes(small_base, tmp_path):
    options = run_options("tiny/mor.yaml", small_base, samples=4, max_steps=1, devices=2, callbacks=None)
    subprocess.run([sys.executable, "-m", "morsr", *options], cwd=tmp_path, check=True, timeout=120)
    (folder,) = tmp_path.rglob("version_0")
    assert {"config.yaml", "versions.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_leave_after_the_same_step_and_go_on_exactly(small_base, tmp_path):
    straight, half, resumed = (tmp_path / name for name in ("straight", "half", "resumed"))
    done = train(small_base, straight)
    assert done.returncode == 0, done.stderr
    done = train(small_base, half, stop=Stop(rank=1))
    assert done.returncode == 143, done.stderr
    # The generator had moved in this step when the signal came; that the others moved too shows in the resumed run.
    assert torch.load(half / "last.ckpt", weights_only=True)["global_step"] == 2
    done = train(small_base, resumed, f"--ckpt_path={half / 'last.ckpt'}")
    assert done.returncode == 0, done.stderr
    expected, end = (torch.load(out / "last.ckpt", weights_only=True) for out in (straight, resumed))
    assert end["global_step"] == expected["global_step"] == STEPS
    torch.testing.assert_close(end["state_dict"], expected["state_dict"], rtol=0, atol=0)
