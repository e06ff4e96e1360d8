"""A canvas holds what is put on it, in memory or in a file, and the memory of a file is given back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from morsr.imaging import Canvas, read


@pytest.mark.parametrize("folder", [None, "."])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_canvas_is_an_array_of_zeros_that_can_be_filled(folder, dtype):
    canvas = Canvas((3, 20, 10), dtype, folder=folder)
    assert not list(Path().iterdir()), "the file has no name"
    assert not canvas.values.any()
    canvas.values[:, 5:10] = 7
    canvas.release()
    canvas.tensor[:, 7:12] = canvas.tensor[:, 7:12] * 2 if dtype == np.float32 else 14
    values = canvas.values
    del canvas
    expected = np.zeros((3, 20, 10), dtype)
    expected[:, 5:10] = 7
    expected[:, 7:12] = expected[:, 7:12] * 2 if dtype == np.float32 else 14
    np.testing.assert_array_equal(values, expected, "values outlive the canvas")


def test_a_disk_without_room_is_told_before_the_work():
    with pytest.raises(OSError, match=r"space|large"):
        Canvas((1 << 30, 1 << 20), folder=".")
    with pytest.raises(OSError, match="No such file"):
        Canvas((4, 4), folder="missing")


@pytest.mark.slow  # a process of its own, which counts memory from its start
def test_the_memory_of_a_canvas_is_given_back_while_it_is_filled_and_written():
    script = """
import resource
import numpy as np
from morsr.imaging import Canvas, Picture, read, write
def grown(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
def fill():
    for top in range(0, 4096, 128):
        canvas.values[top : top + 128] = np.arange(2048, dtype=np.uint8)[:, None]
        canvas.release()
small = read(np.zeros((1024, 1024, 3), np.uint8))
write(small, "warm.png")
canvas = Canvas((4096, 2048, 3), np.uint8, folder=".")
grown(fill)
grown(lambda: write(Picture(samples=canvas.values, canvas=canvas), "out.png"))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert max(map(int, said.split())) < 12 * 1024, "kilobytes, where 24 MB were filled and written"
    assert read("out.png").size == (4096, 2048)
