"""Adapter files: what is refused, damage, hostile headers, and starting from another set."""

import contextlib
import copy
import json
import random
import resource
import struct
import time
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from morsr.adapters import Router, inject, load_adapters, read_adapters_header, save_adapters
from morsr.adapters.files import start_from_adapters
from morsr.adapters.inject import layers_of_set, report_of, switch_of
from morsr.errors import ConfigError, InputError, MorsrError, WeightsError


@pytest.fixture
def saved(toy, tmp_path):
    model, _ = toy.make()
    extra, attached = {"base": "toy", "n": 1}, {"prompt": torch.rand(2, 3)}
    save_adapters(tmp_path / "set.safetensors", model, base_id="toy", extra=extra, attached=attached)
    return tmp_path / "set.safetensors"


def _parts(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_base_is_known_by_its_weights_in_any_precision(saved, toy):
    load_adapters(saved, toy.bare().to(torch.float16))
    other = toy.bare()
    with torch.no_grad():
        other.dilated.weight.add_(0.05)
    wider = toy.Toy(16)
    for model in (other, wider, torch.nn.Sequential(toy.bare())):
        with pytest.raises(WeightsError, match="base"):
            load_adapters(saved, model)
        assert switch_of(model) is None


def _of_release_0_1(tensors):
    """The tensors under the names and in the layout of the first release."""
    old = {"context.severity_mean": torch.ones(())}
    for key, value in tensors.items():
        key = key.replace("router.", "context.").replace("lora_A", "down").replace("lora_B", "up")
        if not key.endswith("severities"):
            old[key] = value.t().contiguous() if key.endswith(".up") else value
    return old


def test_a_file_of_release_0_1_loads(saved, toy, tmp_path):
    metadata, tensors = _parts(saved)
    old = {**_of_release_0_1(tensors), "whole.norm.weight": torch.rand(8), "whole.norm.bias": torch.rand(8)}
    header = json.loads(metadata["header"]) | {"whole": {"norm.weight": [8], "norm.bias": [8]}}
    header["config"] |= {"gate": "renormalize", "dtype": "float32", "router": "linear", "router_hidden": 32}
    metadata = {"format": "morsr-adapters", "format_version": "2", "header": json.dumps(header)}
    model, base = toy.bare(), toy.bare()
    load_adapters(saved, model)
    save_file(old, tmp_path / "old.safetensors", metadata)
    report = load_adapters(tmp_path / "old.safetensors", base)
    assert (report.config.gate, list(report.copies)) == ("renormalize", ["norm"])
    for (_, _, ranks), (_, _, wanted) in zip(
        layers_of_set(base, "generator"), layers_of_set(model, "generator"), strict=True
    ):
        torch.testing.assert_close(ranks.state_dict(), wanted.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(report.copies["norm"].weight, old["whole.norm.weight"])


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"num_zero": 3}, {"scale": 0.5}, {"targets": ("conv_in", "to_q")}])
def test_a_set_with_other_settings_is_refused(saved, toy, settings):
    model, _ = toy.make(**settings)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match="settings"):
        load_adapters(saved, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_cannot_be_saved_leaves_the_file_as_it_was(saved, toy):
    before, (model, _) = saved.read_bytes(), toy.make()
    with pytest.raises(InputError):
        save_adapters(saved, model, extra={"x": object()})
    with pytest.raises(ConfigError):
        save_adapters(saved, model, name="other")
    with torch.no_grad():
        model.conv_in.sets["generator"].lora_A[0] = torch.inf
    with pytest.raises(WeightsError):
        save_adapters(saved, model)
    assert saved.read_bytes() == before


def test_flipped_bits_are_refused(saved, toy):
    """Every byte carries: header, settings and tensors are all under the digest."""
    content, source = saved.read_bytes(), random.Random(0)
    places = [source.randrange(8 * len(content)) for _ in range(60)]
    places += [
        8 * source.randrange(8, 8 + struct.unpack("<Q", content[:8])[0]) + source.randrange(8) for _ in range(40)
    ]
    accepted = []
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(bytes(damaged))
        try:
            load_adapters(saved, toy.bare())
            accepted.append(place)
        except WeightsError:
            pass
    assert accepted == []


_VALUES = [None, True, -1, 0, 1.5, 50_000_000, 10**30, "x", "", [], [None], {}, {"a": 1}, float("nan"), "(a+)+$" * 20]


def _mutated(header, draw):
    """The header with one value, at any depth, replaced by something else or left out."""
    whole = {"header": copy.deepcopy(header)}
    inside, key = whole, "header"
    while isinstance(inside[key], (dict, list)) and inside[key] and draw.random() < 0.9:
        inside = inside[key]
        key = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    inside[key] = draw.choice(_VALUES)
    if inside is not whole and draw.random() < 0.1:
        del inside[key]
    return whole["header"]


def _peak():
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_hostile_headers(saved, toy, count):
    """Any header is loaded or refused by a WeightsError, without a digest to hide behind and without large memory."""
    metadata, tensors = _parts(saved)
    header, tensors, draw = json.loads(metadata["header"]), _of_release_0_1(tensors), random.Random(0)
    load_adapters(saved, toy.bare())  # what is imported on first use is not counted
    for _ in range(count):
        text = json.dumps(_mutated(header, draw))
        save_file(tensors, saved, {"format": "morsr-adapters", "format_version": "2", "header": text})
        model, before, start = toy.bare(), _peak(), time.process_time()
        with contextlib.suppress(WeightsError):
            load_adapters(saved, model)
        assert time.process_time() - start < 5, text
        # 64 MB are what an allocator takes at once; the honest file has some kilobytes.
        assert _peak() - before < 2 * saved.stat().st_size + 64 * 2**20, text


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t: t.pop("layers.conv_in.lora_A"),
        lambda m, t: t.update({"layers.conv_in.lora_C": torch.ones(1)}),
        lambda m, t: t.update({"layers.conv_in.lora_A": t["layers.conv_in.lora_A"].int()}),
        lambda m, t: t.update({"layers.conv_in.lora_A": t["layers.conv_in.lora_A"][:1].clone()}),
        lambda m, t: t.update({"router.bias": torch.full_like(t["router.bias"], torch.nan)}),
        lambda m, t: m.update(format="peft"),
        lambda m, t: m.update(format_version="99"),
        lambda m, t: m.update(header="{"),
        lambda m, t: m.update(header="[" * 100_000),
        lambda m, t: m.pop("digest"),
    ],
)
def test_damaged_files(saved, toy, change):
    metadata, tensors = _parts(saved)
    change(metadata, tensors)
    save_file(tensors, saved, metadata)
    model = toy.bare()
    with pytest.raises(WeightsError):
        load_adapters(saved, model)
    assert switch_of(model) is None


@pytest.mark.parametrize("name", ["missing.safetensors", "folder", "text.safetensors", "run.ckpt", "empty.safetensors"])
def test_paths_that_are_no_adapters_file(tmp_path, toy, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("not one")
    (tmp_path / "run.ckpt").write_bytes(b"PK")
    (tmp_path / "empty.safetensors").touch()
    for read in (read_adapters_header, lambda path: load_adapters(path, toy.Toy())):
        with pytest.raises(MorsrError, match=name):
            read(tmp_path / name)


def test_start_from_a_plain_lora_fills_the_first_shared_ranks(toy, images, scores, tmp_path):
    small, _ = toy.make(toy.small("lora", num_ranks=2, scale=2.0, targets=("conv_in", "to_q")))
    save_adapters(tmp_path / "lora.safetensors", small)
    model, report = toy.make(filled=False)
    assert "2 of 7 layers" in start_from_adapters(tmp_path / "lora.safetensors", model)
    report.route(scores)
    with torch.no_grad():
        torch.testing.assert_close(model(images), small(images), rtol=1e-4, atol=1e-5)


def test_start_from_the_same_settings_takes_router_and_ranks(saved, toy, images, scores):
    source, there = toy.make()
    model, report = toy.make(toy.small(balance_alpha=0.5), filled=False)
    torch.nn.init.normal_(report.router.weight)
    start_from_adapters(saved, model)
    for one in (there, report):
        one.route(scores)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))


def test_start_from_what_does_not_fit_changes_nothing(saved, toy, tmp_path):
    wide, _ = toy.make(toy.small("lora", num_ranks=3))
    save_adapters(tmp_path / "wide.safetensors", wide)
    for path, config in ((saved, toy.small(top_k=3)), (tmp_path / "wide.safetensors", toy.small())):
        model, _ = toy.make(config, filled=False)
        with pytest.raises(WeightsError):
            start_from_adapters(path, model)
        assert all(not ranks.lora_B.any() for _, _, ranks in layers_of_set(model, "generator"))


def test_start_from_takes_modules_trained_whole_only_where_the_set_trains_them(toy, tmp_path):
    source, _ = toy.make(toy.small(modules_to_save=("norm",)))
    save_adapters(tmp_path / "whole.safetensors", source)
    model, report = toy.make(filled=False)
    with pytest.raises(WeightsError, match="modules_to_save"):  # no optimizer would move them
        start_from_adapters(tmp_path / "whole.safetensors", model)
    assert not report.copies
    model, report = toy.make(toy.small(modules_to_save=("norm",)), filled=False)
    start_from_adapters(tmp_path / "whole.safetensors", model)
    assert list(report.copies) == ["norm"]


class Deep(Router):
    """A router with parameters of its own."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.inner = torch.nn.Linear(self.num_scores, self.num_scores)


def test_a_set_with_a_router_of_ones_own_starts_from_its_file(toy, tmp_path):
    model = toy.Toy()
    again = copy.deepcopy(model)
    inject(model, toy.small(), condition_dim=3, router=Deep)
    save_adapters(tmp_path / "deep.safetensors", model)
    report = inject(again, toy.small(), condition_dim=3, router=Deep)
    start_from_adapters(tmp_path / "deep.safetensors", again, Deep)
    assert torch.equal(report.router.inner.weight, report_of(model).router.inner.weight)
