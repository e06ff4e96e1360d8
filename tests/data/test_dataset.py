"""Which sample comes when: every image in its turn, on any number of workers and devices; hostile files."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import save, smooth
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from morsr.data.dataset import EvaluationImages, ImageLoader, PassOrder, TrainingCrops, image_key
from morsr.data.sources import find_photos
from morsr.errors import ConfigError, InputError


def crops(photos: Any, **settings: Any) -> TrainingCrops:
    return TrainingCrops(photos, **{"samples": 24, "crop_size": 32, "seed": 3, **settings})


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20), seed=st.integers(0, 2**64 - 1))
def test_images_come_as_often_as_their_weights_say(weights, seed):
    order, count = PassOrder(np.array(weights), seed), len(weights)
    for start in (0, count, 5 * count):
        shown = Counter(order(start + place) for place in range(count))
        for image, weight in enumerate(weights):
            assert abs(shown[image] - weight * count / sum(weights)) < 1 + 1e-6
    equal = PassOrder(np.ones(count), seed)
    assert sorted(equal(place) for place in range(count)) == list(range(count))


def test_a_sample_is_a_function_of_its_number(photos):
    one, two = (crops(find_photos(str(photos)), synthetic=0.25, cache_mb=mb) for mb in (0, 1))
    numbers = [5, 29, 5, 100, 3]
    together, apart = [one[number] for number in numbers], [two[number] for number in reversed(numbers)][::-1]
    for first, second in zip(together, apart, strict=True):
        assert (first["stem"], first["kind"]) == (second["stem"], second["kind"])
        for name in ("hr", "lr", "key"):
            assert torch.equal(first[name], second[name])
    assert len({int(one[number]["key"]) for number in range(72)}) == 72, "three epochs"
    assert int(crops(find_photos(str(photos)), seed=4)[0]["key"]) != int(one[0]["key"])


def test_every_photograph_comes_once_before_one_comes_again(photos):
    data = crops(find_photos(str(photos)), samples=16, synthetic=0.5)
    stems = [data[number]["stem"] for number in range(28)]
    shown = [stem for stem in stems if stem.startswith("photo")]
    assert len(shown) == 14
    assert sorted(shown[:7]) == sorted(shown[7:]) == [f"photo{number}" for number in range(7)]
    assert len({stem for stem in stems if stem.startswith("dead_leaves_")}) == 14


def test_a_crop_is_a_mirrored_or_turned_window_of_its_photograph(photos):
    data, turned = crops(find_photos(str(photos))), set()
    for number in range(24):
        item = data[number]
        (path,) = photos.rglob(f"{item['stem']}.png")
        whole = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        found = {
            (mirrored, quarter)
            for mirrored in (False, True)
            for quarter in range(4)
            for crop in [(item["hr"].flip(2) if mirrored else item["hr"]).rot90(quarter, (1, 2))]
            for top, left in (whole[:, :-31, :-31] == crop[:, :1, :1]).all(0).nonzero().tolist()
            if torch.equal(whole[:, top : top + 32, left : left + 32], crop)
        }
        assert len(found) == 1
        turned |= found
    assert len(turned) > 5


def test_files_that_cannot_be_used_are_passed_over_and_named(photos):
    (photos / "text.jpg").write_text("hello")
    (photos / "cut.png").write_bytes((photos / "photo0.png").read_bytes()[:-40])
    save(photos / "small.png", smooth(20, 90, 0))
    os.mkfifo(photos / "pipe.png")
    data = crops(find_photos(str(photos)))
    items = [data[number] for number in range(40)]
    assert {item["stem"] for item in items} == {f"photo{number}" for number in range(7)}
    named = {Path(path).name for item in items for path in item["skipped"]}
    assert named == {"text.jpg", "cut.png", "small.png"}


def test_several_devices_count_every_image_once(photos):
    images = EvaluationImages(find_photos(str(photos)), [0], multiple=16, devices=2)
    shares = [[images[place] for place in range(rank, len(images), 2)] for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4], "devices wait for each other after every batch"
    counted = [item["stem"] for share in shares for item in share if not item["repeated"]]
    assert len(set(counted)) == len(counted) == 7


def test_a_key_belongs_to_a_name_and_a_seed():
    assert image_key("café", 3) == 5680005842969798773
    names = (os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "café", "caf")
    assert len({image_key(name, seed) for name in names for seed in (0, 1)}) == 8


class Faulty(Dataset[int]):
    """Numbers up to 4; the third is an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        if place == 2:
            raise self.error
        return place


@pytest.mark.parametrize(("workers", "kind"), [(0, InputError), (1, ConfigError)])
def test_an_error_of_the_data_is_one_line_from_any_process(workers, kind):
    loader = ImageLoader(Faulty(kind("a.png: broken,\nexpected a picture")), batch_size=1, num_workers=workers)
    with pytest.raises(kind) as caught:
        list(loader)
    assert str(caught.value) == "a.png: broken,\nexpected a picture"
