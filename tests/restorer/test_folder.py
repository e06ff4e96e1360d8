"""Folders: batches of equal size, sequences that hold one routing, failures that stop nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import restorer_twins as twins
import torch
from PIL import Image

from morsr.errors import ConfigError, MorsrError
from morsr.models import folder as folder_module
from morsr.models import streaming
from morsr.models.folder import batches, failure, restore_files, start_sequence
from morsr.models.jobs import Job, natural_order
from morsr.models.restorer import Restorer
from morsr.models.settings import Settings


def photo(name: str, size: tuple[int, int] = (12, 8), *, low: int = 0, high: int = 256) -> Job:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(name.encode())
    Image.fromarray(np.random.default_rng(seed).integers(low, high, (*size[::-1], 3), np.uint8)).save(path)
    return Job(path, Path("out") / path)


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def run(restorer: Restorer, jobs: list[Job], **settings: object) -> list[str]:
    """Restore, and return what failed."""
    batch = settings.pop("batch", "auto")
    frames = settings.pop("frames", None)
    outcomes = list(restore_files(restorer, jobs, Settings(**settings), batch=batch, frames=frames))
    assert sorted(outcome.job for outcome in outcomes) == sorted(jobs), "each file is told of once"
    return [failure(outcome) for outcome in outcomes if outcome.error is not None]


def test_equal_sizes_go_together():
    sizes = [(12, 8), (8, 12), (12, 8), (8, 12), (12, 8)]
    jobs = [photo(f"in/{index}.png", size) for index, size in enumerate(sizes)]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 12)).save("in/turned.jpg", exif=exif)  # 12 x 8 once it stands upright
    jobs.append(Job(Path("in/turned.jpg"), Path("out/turned.jpg")))
    restorer = twins.fake(twins.smoothing)
    assert run(restorer, jobs, batch=8) == []
    assert sorted(restorer.generator.sizes) == [(32, 48), (48, 32)]
    assert Image.open("out/turned.jpg").size == (32, 48), "stored as it came"


def test_a_batch_gives_what_single_images_give(restorer: Restorer):
    jobs = [photo(f"in/{index}.png", low=40 * index, high=40 * index + 60) for index in range(4)]
    assert run(restorer, jobs, batch=3) == []
    for job in jobs:
        restorer.restore_file(job.source, "alone.png")
        assert np.abs(pixels(job.target) - pixels("alone.png")).max() <= 1


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield 3
        found: list[int] = []
        fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))  # takes over what is set for all
        fresh.start()
        fresh.join()
        assert found == [3], "a folder leaves the number of threads as it was"
    finally:
        torch.set_num_threads(before)


def test_images_on_a_processor_go_through_lanes_and_tiles_come_alone(
    threads: int, monkeypatch: pytest.MonkeyPatch, restorer: Restorer
):
    seen: dict[str, set[tuple[int, int]]] = {}

    def watch(name: str) -> None:
        original = getattr(folder_module, name)

        def watched(*arguments: Any) -> Any:
            seen.setdefault(name, set()).add((threading.get_ident(), torch.get_num_threads()))
            return original(*arguments)

        monkeypatch.setattr(folder_module, name, watched)

    barrier = threading.Barrier(threads, timeout=120)
    plain = folder_module._read
    monkeypatch.setattr(folder_module, "_read", lambda one: (barrier.wait(), plain(one))[1])  # all lanes at once
    watch("_read")
    watch("_write")
    assert run(restorer, [photo(f"in/{index}.png") for index in range(2 * threads)]) == []
    assert seen["_read"] == seen["_write"]
    assert len(seen["_read"]) == threads
    assert {count for _, count in seen["_read"]} == {1}
    monkeypatch.setattr(folder_module, "_read", plain)
    watch("_together")
    assert run(restorer, [photo("in/large.png")], tile=32) == []
    assert seen["_together"] == {(threading.get_ident(), threads)}


def test_lanes_route_each_image_by_itself(threads: int, restorer: Restorer):
    """Every image comes out as alone, with settings that reach each lane, and the caller's model is left as it was."""
    before = {name: value.clone() for name, value in restorer.generator.state_dict().items()}
    jobs = [photo(f"in/{index}.png", (20 + index, 24)) for index in range(7)]
    assert run(restorer, jobs, budget=1) == []
    for job in jobs:
        restorer.restore_file(job.source, "alone.png", budget=1)
        assert np.abs(pixels(job.target) - pixels("alone.png")).max() <= 1
    restorer.restore_file(jobs[0].source, "all.png")
    assert np.abs(pixels("all.png") - pixels(jobs[0].target)).max() > 1, "the budget has an effect"
    for name, value in restorer.generator.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    twin = restorer.twin()
    for (name, one), (_, other) in zip(
        restorer.generator.named_parameters(), twin.generator.named_parameters(), strict=True
    ):
        assert one is other, f"{name} is held twice"
    assert twin.generator.context is not restorer.generator.context


def test_batches_are_no_larger_than_asked_for_and_than_the_memory(monkeypatch: pytest.MonkeyPatch):
    jobs = [photo(f"in/{index}.png") for index in range(5)]
    restorer = twins.fake()

    def lengths(settings: Settings, batch: object) -> list[int]:
        return [len(batch.jobs) for batch in batches(restorer, jobs, settings, batch)]

    assert lengths(Settings(), 2) == [2, 2, 1]
    assert lengths(Settings(), "auto") == [1] * 5, "a processor gains nothing from more"
    assert lengths(Settings(tile=32), 4) == [1] * 5
    with pytest.raises(ConfigError, match="batch"):
        lengths(Settings(), 0)
    plan = folder_module.tile_plan(restorer.generator, (32, 48), None, torch.device("cpu"))
    plan.pixels_at_once = 2 * plan.height * plan.width
    monkeypatch.setattr(folder_module, "tile_plan", lambda *arguments: plan)
    assert lengths(Settings(), 4) == [2, 2, 1]


def test_what_fails_is_told_and_the_rest_of_its_batch_goes_on():
    jobs = [photo(f"in/{index}.png", low=100) for index in range(3)]
    jobs.append(Job(Path("in/text.png"), Path("out/text.png")))
    Path("in/text.png").write_text("Dear Sir or Madam")
    jobs.append(photo("in/alpha.png"))
    Image.new("RGBA", (12, 8), (1, 2, 3, 4)).save("in/alpha.png")
    jobs[-1] = Job(jobs[-1].source, Path("out/alpha.jpg"))
    Image.new("RGB", (12, 8)).save("in/1.png")

    def black_breaks(images: torch.Tensor) -> torch.Tensor:
        return images * float("nan") if bool((images.mean(dim=(1, 2, 3)) == 0).any()) else images

    failed = run(twins.fake(black_breaks), jobs, batch=8)
    assert len(failed) == 3
    assert any("text.png: not a PNG" in line for line in failed)
    assert any("alpha.png" in line and "no transparency" in line for line in failed)
    assert any("in/1.png" in line and "NaN" in line for line in failed)
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["0.png", "2.png"]


def test_a_full_disk_fails_each_file_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    jobs = [photo(f"in/{index}.png") for index in range(2)]

    def full(self: object, file: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    failed = run(twins.fake(), jobs)
    assert sorted(failed) == [f"out/in/{index}.png: cannot be written (No space left on device)" for index in range(2)]
    assert not [path for path in Path("out").rglob("*") if path.is_file()]


def test_large_files_are_streamed(monkeypatch: pytest.MonkeyPatch):
    jobs = [photo("in/small.png"), photo("in/large.png", (40, 40))]
    monkeypatch.setattr(streaming, "STREAM_PIXELS", 10_000)
    restorer = twins.fake(twins.smoothing)
    streamed = [batch.jobs[0].source.name for batch in batches(restorer, jobs, Settings()) if batch.streamed]
    assert streamed == ["large.png"]
    assert run(restorer, jobs, tile=64) == []
    assert pixels("out/in/large.png").shape == (160, 160, 3)


def test_frames_are_in_natural_order_and_each_folder_is_a_sequence(restorer: Restorer):
    """Frame 10 comes after frame 2, though not in the order of letters; the first frame of a folder decides."""
    jobs = [
        photo("a/frame10.png", low=0, high=20),
        photo("a/frame2.png", low=150, high=256),
        photo("a/frame1.png", low=0, high=60),
        photo("b/frame1.png", low=200, high=256),
    ]
    assert run(restorer, jobs, routing="sequence", batch=2) == []
    for folder in "ab":
        restorer.reset_sequence()
        for job in sorted((job for job in jobs if job.source.parent == Path(folder)), key=natural_order):
            restorer.restore_file(job.source, "alone.png", routing="sequence")
            assert np.abs(pixels(job.target) - pixels("alone.png")).max() <= 1
    restorer.restore_file("a/frame2.png", "own.png")
    assert np.abs(pixels("out/a/frame2.png") - pixels("own.png")).max() > 1, "its own routing would be another"


def test_digits_that_are_no_numbers_are_sorted_as_letters():
    names = ["10²3.jpg", "①2.jpg", "2.jpg", "10.jpg"]
    jobs = [Job(Path(name), Path("out") / name) for name in names]
    found = [job.source.name for job in sorted(jobs, key=natural_order)]
    assert found.index("2.jpg") < found.index("10.jpg")
    assert sorted(found) == sorted(names)


def test_a_sequence_that_goes_on_keeps_the_first_frames_routing(restorer: Restorer):
    jobs = [photo("a/1.png", low=0, high=60), photo("a/2.png", low=150, high=256)]
    assert run(restorer, jobs, routing="sequence") == []
    whole = pixels("out/a/2.png")
    assert run(restorer, jobs[1:], routing="sequence", frames=jobs) == []
    np.testing.assert_array_equal(pixels("out/a/2.png"), whole)


def test_an_unreadable_first_frame_leaves_the_routing_to_the_next(restorer: Restorer):
    jobs = [photo("a/1.png"), photo("a/2.png")]
    Path("a/1.png").write_text("")
    failed = run(restorer, jobs, routing="sequence")
    assert len(failed) == 1
    assert "empty" in failed[0]
    assert Path("out/a/2.png").is_file()


def test_a_sequence_with_an_unreadable_first_frame_goes_on_with_the_same_routing(restorer: Restorer):
    jobs = [photo(f"a/{index}.png", low=low, high=low + 60) for index, low in enumerate((0, 0, 190, 90))]
    Path("a/0.png").write_text("")
    assert len(run(restorer, jobs, routing="sequence")) == 1
    whole = pixels("out/a/3.png")
    assert len(run(restorer, [jobs[0], *jobs[2:]], routing="sequence", frames=jobs)) == 1
    np.testing.assert_array_equal(pixels("out/a/3.png"), whole)
    start_sequence(restorer, jobs[0].source)  # as by `morsr predict`
    restorer.restore_file("a/3.png", "alone.png", routing="sequence")
    np.testing.assert_array_equal(pixels("alone.png"), whole)
    run(restorer, jobs[2:], routing="sequence")
    assert (pixels("out/a/3.png") != whole).any(), "the routing of another frame would be another"


def test_a_sequence_needs_routed_adapters():
    jobs = [photo("a/1.png")]
    failed = run(twins.fake(), jobs, routing="sequence")
    assert "routed adapters" in failed[0]
    assert issubclass(ConfigError, MorsrError)
