"""One fixed routing folded into a diffusers folder: the same image there, by us and by diffusers alone."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from morsr.adapters.inject import plain_state_dict
from morsr.cli import main
from morsr.errors import ConfigError, InputError
from morsr.models.bases import load_base
from morsr.models.exchange.fixed import export_diffusers, fix_routing
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator


def test_the_folder_gives_the_same_image(adapters_file, photo, restored):
    settings = ["--model", str(adapters_file), "--image", str(photo), "--strength", "1.5"]
    assert main(["export", "diffusers", "merged", *settings]) == 0
    model = load_generator(adapters_file)
    expected = restored(model, photo, strength=1.5)
    assert (expected - restored(model, photo, strength=0.0)).abs().max() > 0.01
    torch.testing.assert_close(restored(load_generator("merged"), photo), expected, atol=1e-5, rtol=0)


def test_the_lines_of_the_docs_give_the_same_image(adapters_file, photo, restored, pixels, repo_root):
    """With nothing of ours."""
    Image.open(photo).resize((14, 10)).save(photo)  # sides that fit the grid need no padding
    assert main(["export", "diffusers", "OUT", "--model", str(adapters_file), "--image", str(photo)]) == 0
    page = (repo_root / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AutoencoderTiny" in part)
    names = {"image": pixels(photo)}
    exec(block.replace("lr = torch.rand(1, 3, 32, 32)", "lr = image"), names)
    torch.testing.assert_close(names["sr"], restored(load_generator(adapters_file), photo), atol=1e-5, rtol=0)


def test_export_changes_the_adapted_weights_and_nothing_else(generator, small_base, lr):
    fix_routing(generator, image=lr)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    export_diffusers("merged", generator)
    torch.testing.assert_close(generator.state_dict(), before, atol=0, rtol=0)
    merged, bare = (plain_state_dict(load_base(base)) for base in ("merged", small_base))
    changed = {key for key, value in merged.items() if not torch.equal(value, bare[key])}
    assert changed == {f"{name}.weight" for name in generator.adapters.layer_names}


def test_settings_that_fix_no_routing(generator, small_base, lr):
    with pytest.raises(InputError):
        export_diffusers("merged", generator)
    bare = OneStepGenerator(load_base(small_base))
    assert fix_routing(bare) == {}
    for model, settings in [(generator, {}), (bare, {"image": lr}), (bare, {"strength": 0.5})]:
        with pytest.raises(ConfigError):
            fix_routing(model, **settings)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "lora", "file"],
        ["export", "diffusers", "file"],
        ["export", "onnx", "."],
        ["export", "lora", "out"],
    ],
)
def test_the_command_refuses_in_one_line(arguments, adapters_file, capsys):
    Path("file").write_text("mine")
    assert main([*arguments, "--model", str(adapters_file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("morsr: ")
    assert not Path("out").exists()
