"""The prompt embeddings travel with the adapters, so that whoever runs them needs no text encoder."""

import shutil
from pathlib import Path

import pytest
import torch

from morsr.adapters import MoRConfig, read_attached, save_adapters
from morsr.errors import WeightsError
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.bases.reading import encode_texts
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator


@pytest.mark.parametrize("cached", [True, False])
def test_adapters_bring_the_prompts_they_were_trained_with(sd_folder: Path, tmp_path: Path, cached: bool) -> None:
    base = load_base(sd_folder, prompts={"clean": "a"})
    config = MoRConfig(num_ranks=4, num_shared=1, top_k=1, num_zero=1, targets=("sd_unet@unet",))
    OneStepGenerator(base, build_estimator("frequency"), adapters=config)
    recipe = {"estimator": {"kind": "frequency", "args": {}}, "one_step": OneStepConfig().to_dict(),
              "base": str(sd_folder)}  # fmt: skip
    file = tmp_path / "adapters.safetensors"
    save_adapters(file, base, base_id=base.base_id, extra=recipe, attached=base.prompts if cached else None)
    own = load_generator(file, prompt="photo").base.prompt_clean
    torch.testing.assert_close(own, encode_texts(sd_folder, "local", ["photo"]))
    shutil.rmtree(sd_folder / "text_encoder")
    if not cached:
        assert read_attached(file) == {}
        with pytest.raises(WeightsError, match="text_encoder"):
            load_generator(file)
        return
    torch.testing.assert_close(load_generator(file).base.prompts, base.prompts, atol=0, rtol=0)
