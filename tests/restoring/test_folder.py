"""Folders: names, failures that stop nothing, and the share of one of several processes."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import restorer_twins as twins
import torch
from PIL import Image

from morsr.errors import ConfigError, InputError
from morsr.restoring import Restorer, Settings
from morsr.restoring import restorer as restorer_module
from morsr.restoring.folder import Job, processes, restore_files


def photo(name: str, **colours: int) -> Job:
    return Job(twins.photo(name, (12, 8), **colours), Path("out", name))


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def run(restorer: Restorer, jobs: list[Job], **settings: Any) -> list[str]:
    """Restore, and return what failed."""
    lines = list(restore_files(restorer, jobs, Settings(**settings)))
    assert len(lines) == len(jobs)
    return [line for line in lines if line is not None]


def test_an_accelerator_works_on_several_files_and_a_processor_on_one():
    seen: dict[str, set[int]] = {"cpu": set(), "cuda": set()}
    for device, threads in seen.items():

        def restore(source: Path, target: Path, *, threads: set[int] = threads, **options: Any) -> None:
            threads.add(threading.get_ident())
            time.sleep(0.02)
            if source.name == "b":
                raise InputError("b: damaged")

        restorer: Any = twins.fake()
        restorer.device, restorer.restore_file = torch.device(device), restore
        jobs = [Job(Path(name), Path(name)) for name in "abcd"]
        assert list(restore_files(restorer, jobs, Settings())) == [None, "b: damaged", None, None]
    assert seen["cpu"] == {threading.get_ident()}
    assert len(seen["cuda"]) > 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script that starts no step is alone
    ],
)
def test_processes_of_torchrun_and_srun(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes() == expected


def test_a_folder_gives_what_single_files_give(restorer):
    jobs = [photo(f"in/{index}.png", low=40 * index, high=40 * index + 60) for index in range(4)]
    assert run(restorer, jobs) == []
    for job in jobs:
        restorer.restore_file(job.source, "alone.png")
        np.testing.assert_array_equal(pixels(job.target), pixels("alone.png"))


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch):
    jobs = [photo(f"in/{index}.png", low=100) for index in range(3)]
    Path("in/line\nbreak.png").write_text("Dear Sir or Madam")
    Image.new("RGBA", (12, 8), (1, 2, 3, 4)).save("in/alpha.png")
    Image.new("RGB", (12, 8)).save("in/1.png")
    jobs.append(Job(Path("in/line\nbreak.png"), Path("out/text.png")))
    jobs.append(Job(Path("in/alpha.png"), Path("out/alpha.jpg")))
    jobs.append(photo("in/huge.png"))
    read = restorer_module.read

    def hungry(path: Path) -> Any:
        if path.name == "huge.png":
            raise MemoryError
        return read(path)

    def black_breaks(images: torch.Tensor) -> torch.Tensor:
        return images * float("nan") if bool((images.mean(dim=(1, 2, 3)) == 0).any()) else images

    monkeypatch.setattr(restorer_module, "read", hungry)
    failed = run(twins.fake(black_breaks), jobs)
    assert len(failed) == 4
    for name, reason in (("line\\nbreak.png", ""), ("alpha.png", "transparency"), ("1.png", "NaN"), ("huge", "Memory")):
        assert any(name in line and reason in line and "\n" not in line for line in failed)
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["0.png", "2.png"]


def test_our_own_mistakes_stop_the_run():
    def broken(images: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(twins.fake(broken), [photo("in/a.png")])
    with pytest.raises(ConfigError, match="routed adapters"):
        run(twins.fake(), [photo("in/a.png")], strength=0.5)


def test_a_stopped_folder_does_not_go_on():
    jobs = [photo(f"in/{index}.png") for index in range(20)]
    lines = restore_files(twins.fake(lambda images: (time.sleep(0.02), images)[1]), jobs, Settings())
    assert next(lines) is None
    lines.close()  # type: ignore[attr-defined]
    assert 1 <= len(list(Path("out").rglob("*.png"))) < 20


def test_a_full_disk_fails_each_file_and_leaves_nothing(monkeypatch):
    jobs = [photo(f"in/{index}.png") for index in range(2)]

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    failed = run(twins.fake(), jobs)
    assert len(failed) == 2
    assert all("No space left" in line for line in failed)
    assert not [path for path in Path("out").rglob("*") if path.is_file()]
