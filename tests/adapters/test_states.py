"""One state behind all layers: over threads, in copies, where parts are joined, and where no set works."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from morsr.adapters import MoRConfig, active_adapters, adapter_parameters, auto_merged, inject, merged
from morsr.errors import ConfigError
from morsr.restoring import Restorer

FACTORS = (-4.0, 4.0, -2.0, 2.0, -1.0, 1.0)


def in_a_thread(function, *arguments):
    """Run it in a thread of its own; its result, or its error here."""
    found = {}

    def work():
        try:
            found["result"] = function(*arguments)
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if "error" in found:
        raise found["error"]
    return found["result"]


def run(model, images, checkpointed):
    model.zero_grad()
    output = checkpoint(model, images, use_reentrant=False) if checkpointed else model(images)
    return output.square().mean()


def gradients(model, loss):
    loss.backward()
    return [parameter.grad.clone() for parameter in adapter_parameters(model)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("conditions", ["of the thread", "of the main thread"])
def test_checkpointing_in_another_thread_than_earlier_passes(conditions, make_toy, images, scores):
    model, report = make_toy()

    def step(factor, checkpointed=True):
        if factor is not None:
            report.context.condition = scores * factor
        return gradients(model, run(model, images, checkpointed))

    expected = [step(factor, False) for factor in FACTORS]
    for factor in FACTORS * 2:  # the main thread's numbers get ahead of those of a new thread
        step(factor)
    if conditions == "of the thread":
        found = in_a_thread(lambda: [step(factor) for factor in FACTORS])
    else:
        found = []
        for factor in FACTORS:
            report.context.condition = scores * factor
            found.append(in_a_thread(step, None))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    for factor, theirs in zip(FACTORS, expected, strict=True):  # the main thread goes on with its own
        assert_same(step(factor), theirs)


def test_a_backward_pass_in_another_thread_than_its_forward_pass(make_toy, images, scores):
    model, report = make_toy()
    found = []
    for checkpointed in (False, True):
        report.context.condition = scores
        loss = run(model, images, checkpointed)
        report.context.condition = scores * -2
        found.append(in_a_thread(gradients, model, loss))
    assert_same(*found)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("one", "one"), "two of them have a set 'one'"), (("one", "two"), "works in each: 'one', 'two'")],
)
def test_parts_whose_sets_cannot_go_together_are_left_as_they_are(names, message, toy, fill_set, images):
    model = nn.ModuleDict({"a": toy(), "b": toy()})
    for part, name in zip(model.values(), names, strict=True):
        inject(part, MoRConfig.of_kind("lora", num_ranks=2, targets=["conv_in", "shortcut"]), name=name)
        fill_set(part, name)
    before, keys = model["b"](model["a"](images)), list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        inject(model, MoRConfig.of_kind("lora", num_ranks=2, targets=["to_q"]), name="three")
    assert list(model.state_dict()) == keys
    assert torch.equal(model["b"](model["a"](images)), before)


def test_a_merged_model_is_not_copied(make_toy, scores):
    model, report = make_toy()
    report.context.condition = scores[:1]
    with merged(model):
        for copying in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(ConfigError, match="is merged, and a copy"):
                copying(model)
    assert copy.deepcopy(model).conv_in.shared.layers[0] is not model.conv_in
    assert pickle.loads(pickle.dumps(model)).conv_in.shared.now.active == "generator"


def test_auto_merges_nothing_where_no_set_works(make_toy, toy, scores):
    model, report = make_toy()
    report.context.condition = scores[:1]
    for bare in (model, toy()):
        with active_adapters(bare, None), auto_merged(bare, passes=100) as merge:
            assert merge is None
    with active_adapters(model, None), auto_merged(model, 100, "generator") as merge:
        assert merge.merges == 1
    with pytest.raises(ConfigError, match="no adapter set 'critic'"), auto_merged(model, 100, "critic"):
        pass


@torch.no_grad()
def test_tiles_without_adapters():
    restorer = Restorer.from_pretrained("tiny", device="cpu")
    images = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with active_adapters(restorer.generator.backbone, None):
        assert restorer(images, scale=4, tile=64).shape == (1, 3, 192, 192)
