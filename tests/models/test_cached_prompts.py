"""The prompt embeddings travel with the adapters, so that whoever runs them needs no text encoder."""

import shutil
from pathlib import Path

import pytest
import torch

from morsr.adapters import MoRConfig, read_attached, save_adapters
from morsr.errors import WeightsError
from morsr.estimators import build_estimator
from morsr.models.backbone import load_backbone
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.pretrained import encode_texts


@pytest.mark.parametrize("cached", [True, False])
def test_adapters_bring_the_prompts_they_were_trained_with(sd_folder: Path, tmp_path: Path, cached: bool) -> None:
    backbone = load_backbone(sd_folder, prompts={"clean": "a"})
    config = MoRConfig(num_ranks=4, num_shared=1, top_k=1, num_zero=1, targets=("sd_unet@unet",))
    OneStepGenerator(backbone, build_estimator("frequency"), adapters=config)
    recipe = {"estimator": {"kind": "frequency", "args": {}}, "one_step": OneStepConfig().to_dict(),
              "base": str(sd_folder)}  # fmt: skip
    file = tmp_path / "adapters.safetensors"
    save_adapters(file, backbone, base_id=backbone.base_id, extra=recipe, attached=backbone.prompts if cached else None)
    own = load_generator(file, prompt="photo").backbone.prompt_clean
    torch.testing.assert_close(own, encode_texts(sd_folder, "local", ["photo"]))
    shutil.rmtree(sd_folder / "text_encoder")
    if not cached:
        assert read_attached(file) == {}
        with pytest.raises(WeightsError, match="text_encoder"):
            load_generator(file)
        return
    torch.testing.assert_close(load_generator(file).backbone.prompts, backbone.prompts, atol=0, rtol=0)
