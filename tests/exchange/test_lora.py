"""One fixed routing as LoRA files: diffusers and peft load them and give the same images."""

from pathlib import Path

import pytest
import torch
from twins import pipeline

from morsr.cli import main
from morsr.errors import ConfigError, InputError
from morsr.models.bases import load_base
from morsr.models.exchange.fixed import export_lora, fix_routing
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator


def test_the_folder_holds_the_whole_restoration(adapters_file, photo, small_base, restored, capsys):
    from peft import PeftModel

    assert main(["export", "lora", "out", "--model", str(adapters_file), "--image", str(photo)]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "diffusers loads no LoRA into a VAE" in line]
    base = load_base(small_base)
    made = pipeline(base)
    made.load_lora_weights("out")
    base.vae = PeftModel.from_pretrained(base.vae, "out/vae").base_model.model
    model = load_generator(adapters_file)
    expected = restored(model, photo)
    torch.testing.assert_close(
        restored(OneStepGenerator(base, one_step=model.one_step), photo), expected, atol=1e-5, rtol=0
    )
    made.unload_lora_weights()
    assert (restored(OneStepGenerator(base, one_step=model.one_step), photo) - expected).abs().max() > 0.01


def test_what_no_lora_can_hold(generator, small_base, lr):
    with pytest.raises(InputError):
        export_lora("out", generator)
    fix_routing(generator, image=lr)
    generator.adapters.copies = {"unet.conv_in": torch.nn.Identity()}
    for model in (generator, OneStepGenerator(load_base(small_base))):
        with pytest.raises(ConfigError):
            export_lora("out", model)
    assert not Path("out").exists()
