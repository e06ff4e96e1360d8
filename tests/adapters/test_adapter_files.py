from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from morsr.adapters import (
    AdaptedLayer,
    MoRConfig,
    adapter_names,
    inject,
    load_adapters,
    merged,
    plain_state_dict,
    read_adapters_header,
    read_attached,
    routing_context,
    save_adapters,
)
from morsr.errors import ConfigError, InputError, WeightsError

GOLDEN = Path(__file__).parent / "files"


def fresh(toy):
    torch.manual_seed(0)
    return toy().eval()


def is_bare(model):
    return not any(isinstance(module, AdaptedLayer) for module in model.modules())


@pytest.fixture
def saved(make_toy, tmp_path, images, scores):
    model, report = make_toy()
    context = report.context
    context.condition_names = ("blur", "noise", "jpeg")
    context.set_standardization(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    context.train()
    context.condition = scores
    context.balance_loss(torch.tensor([0.1, 0.5, 0.9]))
    context.eval()
    path = save_adapters(tmp_path / "sub" / "a.safetensors", model, base_id="toy", extra={"steps": 7, "t": [1, 2]})
    with torch.no_grad():
        return path, model, model(images)


def rewrite(path, change_header=None, change_tensors=None, **metadata):
    """The same file with something else in it."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        kept = dict(file.metadata())
    if change_header:
        header = json.loads(kept["header"])
        change_header(header)
        kept["header"] = json.dumps(header)
    if change_tensors:
        change_tensors(tensors)
    other = path.with_name("changed.safetensors")
    save_file(tensors, other, metadata={**kept, **metadata})
    return other


def test_round_trip_gives_the_same_image_and_state(saved, toy, images, scores):
    path, model, expected = saved
    twin = fresh(toy)
    report = load_adapters(path, twin, base_id="toy")
    assert report.context.condition_names == ("blur", "noise", "jpeg")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=0, atol=0)
    report.context.condition = scores
    with torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
    header = read_adapters_header(path)
    assert header["extra"] == {"steps": 7, "t": [1, 2]}
    assert (header["base_id"], header["format_version"]) == ("toy", 1)
    assert MoRConfig.from_dict(header["config"]) == model.conv_in.contexts["generator"].config
    assert not list(path.parent.glob("*.part*"))


def test_load_into_a_set_that_is_there_and_under_another_name(saved, toy, make_toy, images, scores):
    path, _, expected = saved
    model, report = make_toy(filled=False)
    assert load_adapters(path, model).context is report.context
    report.context.condition = scores
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    load_adapters(path, model, name="second")
    assert adapter_names(model) == ("generator", "second")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_files(dtype, error, saved, toy, images, scores, tmp_path):
    path, model, expected = saved
    small = save_adapters(tmp_path / "small.safetensors", model, dtype=dtype)
    tensors = load_file(small)
    assert {value.dtype for key, value in tensors.items() if key.startswith("layers.")} == {dtype}
    assert {value.dtype for key, value in tensors.items() if key.startswith("context.")} == {torch.float32}
    assert small.stat().st_size < path.stat().st_size
    report = load_adapters(small, fresh(toy))
    assert report.context.layer_names == model.conv_in.contexts["generator"].layer_names
    twin = fresh(toy)
    load_adapters(small, twin).context.condition = scores
    with torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=10 * error, atol=10 * error)


def other_base(model):
    model.to_q.weight.data.mul_(1.5)


def test_another_base_is_refused(saved, toy):
    path, _, _ = saved
    with pytest.raises(WeightsError, match="made for the base 'toy', not for 'other'"):
        load_adapters(path, fresh(toy), base_id="other")
    model = fresh(toy)
    other_base(model)
    with pytest.raises(WeightsError, match=r"a\.safetensors.*the weights of to_q differ"):
        load_adapters(path, model)
    assert is_bare(model)
    load_adapters(path, model, check_base=False)
    with pytest.raises(WeightsError, match="conv_in has shape"):
        load_adapters(path, toy(width=16))
    nothing = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="does not fit this model"):
        load_adapters(path, nothing)
    assert is_bare(nothing)


def test_base_in_lower_precision_is_the_same_base(saved, toy, tmp_path):
    path, _, _ = saved
    model = fresh(toy).to(torch.bfloat16)
    load_adapters(path, model)
    again, expected = load_file(save_adapters(tmp_path / "again.safetensors", model)), load_file(path)
    assert again.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, lambda t: t.pop("layers.to_q.up"), r"missing tensors layers\.to_q\.up"),
        (None, lambda t: t.update(x=torch.zeros(1)), "unexpected tensors x"),
        (
            None,
            lambda t: t.update({"context.bias": torch.zeros(1)}),
            r"context\.bias has shape \(1,\), expected \(8, 12\)",
        ),
        (None, lambda t: t["layers.to_q.down"].fill_(float("nan")), "holds NaN"),
        (lambda h: h["config"].update(top_k=99), None, "settings cannot be read"),
        (lambda h: h["config"].update(banana=1), None, "banana"),
        (lambda h: h["layers"].reverse(), None, "another order"),
        (lambda h: h["config"].update(targets=["to_q"]), None, "another base"),
    ],
)
def test_damaged_files_change_nothing(header, tensors, message, saved, toy):
    path = rewrite(saved[0], header, tensors)
    model = fresh(toy)
    with pytest.raises(WeightsError, match=message) as error:
        load_adapters(path, model)
    assert "changed.safetensors" in str(error.value)
    assert is_bare(model)


def test_foreign_and_cut_files(saved, toy, tmp_path):
    path, _, _ = saved
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    newer = rewrite(path, format_version="3")
    for file, message in (
        (cut, r"cut\.safetensors: not a whole"),
        (foreign, "not one of morsr's adapters"),
        (text, "not a whole"),
        (newer, "written in format 3"),
        (tmp_path / "absent", "no such adapter file"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_adapters_header(file)
        with pytest.raises(WeightsError, match=message):
            load_adapters(file, fresh(toy))


def test_same_name_with_other_settings_is_refused(saved, make_toy):
    path, _, _ = saved
    model, report = make_toy(filled=False, top_k=2)
    before = report.context.weight.clone()
    with pytest.raises(WeightsError, match=r"top_k=4 \(here 2\)"):
        load_adapters(path, model)
    assert torch.equal(report.context.weight, before)


def test_saves_that_cannot_be(make_toy, tmp_path, scores):
    model, report = make_toy()
    with pytest.raises(InputError, match="fit JSON"):
        save_adapters(tmp_path / "x", model, extra={"tensor": torch.zeros(1)})
    with pytest.raises(ConfigError, match="no adapter set 'other'"):
        save_adapters(tmp_path / "x", model, name="other")
    with pytest.raises(ConfigError, match="dtype"):
        save_adapters(tmp_path / "x", model, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"holds 1 of the 8 layers"):
        save_adapters(tmp_path / "x", model.head)
    report.context.condition = scores[:1]
    with merged(model):
        with pytest.raises(ConfigError, match="is merged"):
            save_adapters(tmp_path / "x", model)
        with pytest.raises(ConfigError, match="is merged"):
            inject(model, MoRConfig.of_kind("lora", targets=["to_q"]), name="late")
    assert not (tmp_path / "x").exists()


def test_what_no_load_would_take_is_not_saved(saved, make_toy, toy, tmp_path):
    path, model, _ = saved
    before = path.read_bytes()
    ranks = model.to_q.sets["generator"]
    with torch.no_grad():
        ranks.up[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"torch\.float16 cannot hold 1e\+05, the largest .* layers\.to_q\.up"):
        save_adapters(path, model, dtype=torch.float16)
    load_adapters(save_adapters(tmp_path / "wide.safetensors", model, dtype=torch.bfloat16), fresh(toy))
    for place, key in ((ranks.up, r"layers\.to_q\.up"), (model.conv_in.contexts["generator"].mean, r"context\.mean")):
        kept = place.detach().clone()
        with torch.no_grad():
            place.view(-1)[0] = float("nan")
        with pytest.raises(WeightsError, match=f"'generator' is not saved: {key} hold NaN"):
            save_adapters(path, model)
        with torch.no_grad():
            place.copy_(kept)
    with pytest.raises(WeightsError, match=r"attached\.prompt hold NaN"):
        save_adapters(path, model, attached={"prompt": torch.full((2,), float("inf"))})
    assert path.read_bytes() == before


def test_one_tensor_may_be_attached_under_two_names(make_toy, tmp_path):
    tensor = torch.arange(6.0)
    attached = {"clean": tensor, "degraded": tensor, "part": tensor[2:4]}
    path = save_adapters(tmp_path / "a.safetensors", make_toy()[0], attached=attached)
    torch.testing.assert_close(read_attached(path), attached, rtol=0, atol=0)


def golden_model():
    """Twelve fixed numbers per layer, so that the model does not depend on a version's random numbers."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(36, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return model.eval()


# The outputs that each format version gave when its file was made, as `make_golden` below wrote them.
GOLDEN_OUTPUTS = {version: GOLDEN / f"outputs_v{version}.json" for version in (1, 2)}


def golden_output(path):
    model = golden_model()
    load_adapters(path, model).context.condition = torch.tensor([[0.2, 0.9]])
    with torch.no_grad():
        return model(torch.linspace(0, 1, 27).view(1, 3, 3, 3)).flatten()


def make_golden(version: int) -> None:
    """Write the file of a new format version; called by hand, once per version."""
    torch.manual_seed(version)
    model = golden_model()
    config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=["0", "2"])
    inject(model, config, condition_dim=2, condition_names=("blur", "noise"))
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            torch.nn.init.normal_(module.sets["generator"].up)
    if version >= 2:
        context = routing_context(model)
        context.whole = ("0.weight", "2.bias")
        with torch.no_grad():
            model[0].base_layer.weight.add_(0.25)
            model[2].base_layer.bias.sub_(0.5)
    path = save_adapters(GOLDEN / f"v{version}.safetensors", model, base_id="golden")
    GOLDEN_OUTPUTS[version].write_text(json.dumps(golden_output(path).tolist()) + "\n")


@pytest.mark.parametrize("version", GOLDEN_OUTPUTS)
def test_files_of_every_format_version_load(version):
    expected = torch.tensor(json.loads(GOLDEN_OUTPUTS[version].read_text()))
    torch.testing.assert_close(golden_output(GOLDEN / f"v{version}.safetensors"), expected, rtol=1e-5, atol=1e-6)


def test_parameters_trained_whole_travel_with_the_set(make_toy, toy, images, scores, tmp_path):
    model, report = make_toy()
    report.context.whole = ("conv_in.weight", "norm.bias")  # one of an adapted layer, one of a layer that is not
    with torch.no_grad():
        model.conv_in.base_layer.weight.mul_(1.5)
        model.norm.bias.add_(0.1)
    report.context.condition = scores
    path = save_adapters(tmp_path / "a.safetensors", model)
    assert read_adapters_header(path)["format_version"] == 2
    assert read_adapters_header(path)["whole"] == {"conv_in.weight": [8, 3, 3, 3], "norm.bias": [8]}

    loaded = fresh(toy)
    context = load_adapters(path, loaded).context
    context.condition = scores
    assert context.whole == report.context.whole
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    again = save_adapters(tmp_path / "b.safetensors", loaded)
    assert read_adapters_header(again)["layers"] == read_adapters_header(path)["layers"]
    load_adapters(again, loaded)  # over itself, whose weight is no longer the base's

    gone = rewrite(path, lambda header: header["whole"].update({"norm.weights": [8]}))
    with pytest.raises(WeightsError, match=r"missing tensors whole\.norm\.weights"):
        load_adapters(gone, fresh(toy))
    elsewhere = rewrite(
        path,
        lambda header: header["whole"].update({"norm.offset": header["whole"].pop("norm.bias")}),
        lambda tensors: tensors.update({"whole.norm.offset": tensors.pop("whole.norm.bias")}),
    )
    untouched = fresh(toy)
    with pytest.raises(WeightsError, match=r"no parameter norm\.offset"):
        load_adapters(elsewhere, untouched)
    assert is_bare(untouched)


def test_plain_state_is_that_of_the_bare_model(make_toy, toy, images, scores):
    model, report = make_toy()
    bare = fresh(toy)
    assert list(plain_state_dict(model)) == list(bare.state_dict())
    torch.testing.assert_close(plain_state_dict(model), dict(bare.state_dict()), rtol=0, atol=0)
    report.context.condition = scores[:1]
    expected = model(images[:1])
    with merged(model):
        bare.load_state_dict(plain_state_dict(model))
    torch.testing.assert_close(bare(images[:1]), expected)
