"""Two processes, started by the command line, stop at the same step on a signal to either and go on exactly."""

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
    """Sends a signal in the second step, when only the generator has moved.

    It goes to one process, or as from a terminal to all of the group.

    Args:
        number: of the signal.
        rank: which process gets it; None: the whole group, twice within a moment, as from a terminal and a launcher.
    """

    def __init__(self, number: int, rank: int | None = None) -> None:
        self.number, self.rank = number, rank

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step != 2 or optimizer is not pl_module.phase.networks[1].optimizer:
            return
        if self.rank == trainer.global_rank:
            os.kill(os.getpid(), self.number)
        elif self.rank is None and trainer.global_rank == 0:
            for _ in range(2):
                os.killpg(0, self.number)


def train(base: Path, out: Path, *more: str, stop: Stop | None = None) -> subprocess.CompletedProcess[str]:
    """All three networks on dead leaves, two processes over gloo in a group of their own."""
    callbacks: list[dict[str, Any]] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
         "init_args": {"dirpath": str(out), "save_last": True, "save_on_exception": True, "filename": "at-{step}"}},
    ]  # fmt: skip
    if stop is not None:
        callbacks.append({"class_path": "test_stopping_two_processes.Stop", "init_args": vars(stop)})
    command = [
        sys.executable, "-m", "morsr", *run_options("tiny/mor_full.yaml", base),
        "--model.warmup=0", "--data.samples_per_epoch=6", f"--trainer.max_steps={STEPS}", "--trainer.devices=2",
        "--trainer.logger=false", "--trainer.strategy=ddp_find_unused_parameters_true",
        f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.default_root_dir={out}", *more,
    ]  # fmt: skip
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=out.parent, start_new_session=True,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(small_base, tmp_path_factory):
    """What a run that nobody stopped ends with."""
    out = tmp_path_factory.mktemp("straight") / "out"
    done = train(small_base, out)
    assert done.returncode == 0, done.stderr
    return torch.load(out / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stop", "code"),
    [(Stop(signal.SIGINT), 1), (Stop(signal.SIGTERM, 0), 143), (Stop(signal.SIGTERM, 1), 143)],
    ids=["Ctrl-C", "SIGTERM to the first", "SIGTERM to the second"],
)
def test_both_leave_after_the_same_step_and_go_on_exactly(stop, code, straight, small_base, tmp_path):
    done = train(small_base, tmp_path / "half", stop=stop)
    assert done.returncode == code, done.stderr
    half = torch.load(tmp_path / "half" / "last.ckpt", weights_only=True)
    # The generator had moved in this step when the signal came; that the others moved too shows in the resumed run.
    assert half["global_step"] == 2
    resumed = train(small_base, tmp_path / "resumed", f"--ckpt_path={tmp_path / 'half' / 'last.ckpt'}")
    assert resumed.returncode == 0, resumed.stderr
    end = torch.load(tmp_path / "resumed" / "last.ckpt", weights_only=True)
    assert end["global_step"] == straight["global_step"] == STEPS
    for name, value in straight["state_dict"].items():
        torch.testing.assert_close(end["state_dict"][name], value, rtol=0, atol=0, msg=name)
