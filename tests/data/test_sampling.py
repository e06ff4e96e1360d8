"""The order of samples: every image in its turn, devices and resumed runs without overlap or gap."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morsr.data.sampling import EpochSampler, PassOrder, epoch_batches, limited_batches, stratified_share


@given(count=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), start=st.integers(0, 5))
def test_equal_weights_show_every_image_once_per_pass(count: int, seed: int, start: int):
    order = PassOrder(np.ones(count), seed)
    shown = [order(start * count + place) for place in range(count)]
    assert sorted(shown) == list(range(count))


def test_passes_differ_and_do_not_depend_on_what_was_asked_before():
    order = PassOrder(np.ones(50), 3)
    first, second = [order(n) for n in range(50)], [order(n) for n in range(50, 100)]
    assert first != second
    fresh = PassOrder(np.ones(50), 3)
    assert [fresh(n) for n in reversed(range(100))] == (first + second)[::-1]
    assert [PassOrder(np.ones(50), 4)(n) for n in range(50)] != first


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_weighted_images_come_as_often_as_they_should(weights: list[float]):
    order = PassOrder(np.array(weights), 0)
    count = len(weights)
    for number in range(2):
        shown = Counter(order(number * count + place) for place in range(count))
        expected = np.array(weights) / sum(weights) * count
        assert all(abs(shown[image] - expected[image]) < 1 + 1e-6 for image in range(count))


@given(share=st.floats(0, 1), start=st.integers(0, 10**6), length=st.integers(1, 64))
def test_synthetic_samples_are_spread_evenly(share: float, start: int, length: int):
    made = int(stratified_share(start + length, share) - stratified_share(start, share))
    assert abs(made - share * length) < 1 + 1e-6


def test_iterators_are_epochs_and_a_start_skips_batches():
    sampler = EpochSampler(batches=3, batch_size=2)
    assert len(sampler) == 6
    assert list(sampler) + list(sampler) == list(range(12))
    resumed = EpochSampler(batches=3, batch_size=2, epoch=1, start=2)
    assert list(resumed) == [10, 11]
    assert list(resumed) == list(range(12, 18))


def test_devices_share_an_epoch_in_whole_batches():
    ranks = [list(EpochSampler(batches=2, batch_size=3, epoch=1, replicas=2, rank=rank)) for rank in (0, 1)]
    assert ranks == [[12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23]]


def test_batches_of_an_epoch():
    class Trainer:
        limit_train_batches: float = 1.0

    assert [epoch_batches(17, 4, replicas) for replicas in (1, 2, 8)] == [5, 3, 1]
    trainer = Trainer()
    assert limited_batches(None, 7) == limited_batches(trainer, 7) == 7
    trainer.limit_train_batches = 0.5
    assert limited_batches(trainer, 7) == 3
    trainer.limit_train_batches = 20
    assert limited_batches(trainer, 7) == 7
