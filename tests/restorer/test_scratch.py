"""A streamed image's input lies in a file: the same values, and not in memory once it is let go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from morsr.models.scratch import FilePixels


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_moved_values_are_the_same_and_stay_when_forgotten(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0)) * 200).to(dtype).mT
    pixels = FilePixels(tmp_path)
    moved = pixels.moved(values)
    assert (moved.dtype, moved.shape) == (dtype, values.shape)
    for _ in range(2):
        assert torch.equal(moved.float(), values.float())
        pixels.forget()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_forgotten_takes_no_memory(tmp_path: Path) -> None:
    pixels = FilePixels(tmp_path)
    moved = pixels.moved(torch.ones(1 << 25, dtype=torch.uint8))
    pixels.forget()
    before, shared = resident("RssFile"), resident("RssShmem")
    assert int(moved.sum()) == 1 << 25
    if resident("RssShmem") - shared > 1 << 24:
        pytest.skip(f"{tmp_path} lies in memory (tmpfs), where a file's pages count as shared memory; set --basetemp")
    assert resident("RssFile") - before > 1 << 24
    pixels.forget()
    assert resident("RssFile") - before < 1 << 22


FREED = """
import torch
from test_scratch import resident
from morsr.models.memory import blocks_handed_back
with blocks_handed_back():
    before = resident()
    blocks = [torch.ones(1 << 20) for _ in range(32)]
    assert resident() - before > 1 << 26
    del blocks
    assert resident() - before < 1 << 24, (before, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_blocks_go_back_at_once() -> None:
    # In a process of its own: holes that earlier work left in the heap are filled first, and stay.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
