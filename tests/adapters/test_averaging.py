"""The mean of adapter files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from morsr.adapters import average_adapters, load_adapters, read_adapters_header, read_attached, save_adapters
from morsr.cli import main
from morsr.errors import ConfigError, WeightsError


@pytest.fixture
def pair(make_toy, tmp_path) -> tuple[Path, Path]:
    """Two files of one set, the second with other values."""
    model, report = make_toy()
    first = save_adapters(tmp_path / "a.safetensors", model, base_id="toy", extra={"steps": 7})
    with torch.no_grad():
        for parameter in report.context.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for name, parameter in model.named_parameters():
            if name.endswith((".up", ".down")):
                parameter.mul_(3)
    return first, save_adapters(tmp_path / "b.safetensors", model, base_id="toy", extra={"steps": 9})


def test_every_tensor_is_the_weighted_mean(pair, make_toy, tmp_path):
    out = average_adapters(pair, tmp_path / "mean.safetensors", weights=[3, 1])
    first, second, mean = (load_file(path) for path in (*pair, out))
    assert mean.keys() == first.keys()
    for key, value in mean.items():
        assert value.dtype == first[key].dtype
        torch.testing.assert_close(value, (0.75 * first[key] + 0.25 * second[key]).to(value.dtype))
    assert any(not torch.equal(mean[key], first[key]) for key in mean)
    header = read_adapters_header(out)
    assert header["extra"] == {
        "steps": 7,
        "averaged": {"files": ["a.safetensors", "b.safetensors"], "weights": [3, 1]},
    }
    assert {key: header[key] for key in header if key != "extra"} == {
        key: value for key, value in read_adapters_header(pair[0]).items() if key != "extra"
    }
    load_adapters(out, make_toy()[0], base_id="toy")
    half = load_file(average_adapters(pair, tmp_path / "half.safetensors", weights=[3, 1], dtype=torch.float16))
    for key, value in half.items():
        torch.testing.assert_close(value, mean[key].half() if key.startswith("layers.") else mean[key])


def test_a_dtype_too_small_for_the_ranks_writes_nothing(pair, tmp_path):
    large = tmp_path / "large.safetensors"
    tensors = load_file(pair[0])
    key = next(key for key in tensors if key.startswith("layers."))
    tensors[key] = torch.full_like(tensors[key], 1e6)
    with safe_open(pair[0], "pt") as file:
        save_file(tensors, large, file.metadata())
    with pytest.raises(ConfigError, match="float16 cannot hold layers"):
        average_adapters([pair[0], large], tmp_path / "mean.safetensors", dtype=torch.float16)
    assert not (tmp_path / "mean.safetensors").exists()


def test_attached_tensors_are_those_of_the_first(pair, make_toy, tmp_path):
    model, _ = make_toy()
    attached = {"clean": torch.rand(1, 2)}
    first = save_adapters(tmp_path / "c.safetensors", model, base_id="toy", attached=attached)
    out = average_adapters([first, *pair], tmp_path / "mean.safetensors")
    torch.testing.assert_close(read_attached(out)["clean"], attached["clean"], rtol=0, atol=0)
    assert not read_attached(average_adapters([pair[0], first], tmp_path / "mean.safetensors"))


def test_equal_files_give_themselves(pair, tmp_path):
    out = average_adapters([pair[0]] * 3, tmp_path / "mean.safetensors")
    first, mean = load_file(pair[0]), load_file(out)
    for key in first:
        torch.testing.assert_close(mean[key], first[key], rtol=0, atol=0)


def test_files_that_run_at_other_timesteps_are_refused(make_toy, tmp_path):
    model, _ = make_toy()
    files = [
        save_adapters(tmp_path / f"{step}.safetensors", model, extra={"one_step": {"timestep": step}})
        for step in (200, 999)
    ]
    with pytest.raises(WeightsError, match=r"one_step is \{'timestep': 999\}, there \{'timestep': 200\}"):
        average_adapters(files, tmp_path / "mean.safetensors")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"estimator": {"kind": "clip", "args": {}}}, r"estimator is \{'kind': 'clip'.*there \{'kind': 'frequency'"),
        ({"decoder": "tiny"}, "decoder is tiny, there None"),
        ({}, None),
    ],
)
def test_files_that_run_with_other_parts_are_refused(make_toy, tmp_path, other, said):
    model, _ = make_toy()
    run = {"one_step": {"timestep": 200}, "estimator": {"kind": "frequency", "args": {}}}
    files = [
        save_adapters(tmp_path / f"{number}.safetensors", model, extra=extra)
        for number, extra in enumerate((run, {**run, **other}))
    ]
    if said is None:
        average_adapters(files, tmp_path / "mean.safetensors")
        return
    with pytest.raises(WeightsError, match=said):
        average_adapters(files, tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_files_of_other_prompts_are_refused(make_toy, tmp_path):
    model, _ = make_toy()
    prompts = [torch.rand(1, 3, 4), torch.rand(1, 3, 4) + 1, torch.rand(1, 2, 4)]
    prompts.append(prompts[0].bfloat16())
    files = [
        save_adapters(tmp_path / f"{number}.safetensors", model, attached={"clean": prompt})
        for number, prompt in enumerate(prompts)
    ]
    for other in files[1:3]:
        with pytest.raises(WeightsError, match="other numbers are attached as clean"):
            average_adapters([files[0], other], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()
    average_adapters([files[0], files[3]], tmp_path / "mean.safetensors")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 1}, "top_k is 1, there 4"),
        ({"scale": 0.5}, "scale is 0.5"),
        ({"num_ranks": 7}, "num_ranks is 7"),
    ],
)
def test_files_of_other_settings_are_refused(pair, make_toy, tmp_path, settings, said):
    other = save_adapters(tmp_path / "c.safetensors", make_toy(**settings)[0], base_id="toy")
    with pytest.raises(WeightsError, match=said):
        average_adapters([pair[0], other], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_files_of_other_bases_and_layers_are_refused(pair, make_toy, tmp_path):
    elsewhere = save_adapters(tmp_path / "c.safetensors", make_toy()[0], base_id="sd21")
    with pytest.raises(WeightsError, match="base_id is sd21, there toy"):
        average_adapters([pair[0], elsewhere], tmp_path / "mean.safetensors")
    model, _ = make_toy()
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    twisted = save_adapters(tmp_path / "e.safetensors", model, base_id="toy")
    with pytest.raises(WeightsError, match="what the base's conv_in looks like"):
        average_adapters([pair[0], twisted], tmp_path / "mean.safetensors")
    fewer = save_adapters(tmp_path / "d.safetensors", make_toy(targets=("conv_in",))[0], base_id="toy")
    with pytest.raises(WeightsError, match=r"the shape of .* is None, there \["):
        average_adapters([pair[0], fewer], tmp_path / "mean.safetensors")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]])
def test_weights_that_do_not_fit_are_refused(pair, tmp_path, weights):
    with pytest.raises(ConfigError, match="weights: expected 2 positive numbers"):
        average_adapters(pair, tmp_path / "mean.safetensors", weights=weights)
    with pytest.raises(ConfigError, match="at least two"):
        average_adapters(pair[:1], tmp_path / "mean.safetensors")
    with pytest.raises(ConfigError, match="floating-point"):
        average_adapters(pair, tmp_path / "mean.safetensors", dtype=torch.int8)


def test_the_command(pair, tmp_path, capsys):
    out = tmp_path / "mean.safetensors"
    assert main(["average", *map(str, pair), "--out", str(out), "--weights", "1", "3", "--dtype", "float16"]) == 0
    assert load_file(out)["layers.conv_in.down"].dtype == torch.float16
    assert read_adapters_header(out)["extra"]["averaged"]["weights"] == [1, 3]
    assert main(["average", str(pair[0]), str(tmp_path / "none.safetensors"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.strip().endswith("none.safetensors: no such adapter file")


def test_an_output_that_is_an_input_or_no_adapters_file_is_refused(pair, tmp_path, capsys):
    before = [path.read_bytes() for path in pair]
    (tmp_path / "link.safetensors").symlink_to(pair[1])
    (tmp_path / "notes.txt").write_text("mine")
    for name, said in (
        ("a.safetensors", "would overwrite an input"),
        ("link.safetensors", "would overwrite an input"),
        ("notes.txt", "expected an output whose name ends in .safetensors"),
    ):
        assert main(["average", *map(str, pair), "--out", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert [path.read_bytes() for path in pair] == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
