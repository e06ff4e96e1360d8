"""One restorer in several threads, and its copies."""

import copy
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from morsr.imaging import read
from morsr.restoring import Restorer, Settings

DARK, BRIGHT = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * gain for gain in (0.2, 1.0))


def watched(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slow passes down, and count for each how many run at the same time."""
    denoise, inside, seen = restorer.generator.denoise, [], []

    def slow(latents: Tensor) -> Tensor:
        inside.append(None)
        seen.append(len(inside))
        time.sleep(0.05)
        result = denoise(latents)
        inside.pop()
        return result

    monkeypatch.setattr(restorer.generator, "denoise", slow)
    return seen


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each gives, all at once; fails where they wait for each other for ever."""
    found: dict[int, Any] = {}
    start = threading.Barrier(len(works), timeout=120)

    def run(index: int) -> None:
        start.wait()
        found[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(found) == list(range(len(works)))
    return [found[index] for index in range(len(works))]


def test_restorers_of_two_models_run_at_the_same_time(restorer, monkeypatch):
    both = restorer, copy.deepcopy(restorer)
    inside = threading.Barrier(2, timeout=60)
    for one in both:
        encode = one.generator.encode
        monkeypatch.setattr(one.generator, "encode", lambda images, own=encode: (inside.wait(), own(images))[1])
    in_threads(*(lambda one=one: one(DARK) for one in both))


def test_threads_wait_for_each_other(restorer, monkeypatch, tmp_path):
    file = tmp_path / "bright.png"
    Image.fromarray((BRIGHT[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file)
    small = lambda: restorer.restore(read(file), Settings(scale=2))[0].rgb  # noqa: E731
    alone = restorer(DARK), restorer(BRIGHT, strength=0.5), small()
    restorer.restore_file(file, tmp_path / "alone.png")
    seen = watched(restorer, monkeypatch)
    other = Restorer(restorer.generator, device="cpu")  # has the same routing
    dark, bright, pictures, _ = in_threads(
        lambda: restorer(DARK),
        lambda: other(BRIGHT, strength=0.5),
        small,
        lambda: restorer.restore_file(file, tmp_path / "together.png"),
    )
    assert seen == [1, 1, 1, 1]
    for together, expected in zip((dark, bright, pictures), alone, strict=True):
        assert_close(together, expected, atol=0, rtol=0)
    assert (tmp_path / "together.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_restore_alike(twin, restorer):
    assert_close(twin(restorer)(DARK), restorer(DARK))
