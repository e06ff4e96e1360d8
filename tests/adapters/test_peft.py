"""peft as the oracle: an even gate is a plain LoRA, and so is one image's routing."""

import pytest
import torch

from morsr.adapters.inject import layers_of_set
from morsr.errors import InputError
from morsr.models.exchange.fixed import export_peft, lora_state_dict

peft = pytest.importorskip("peft")

# peft's ranks ignore dilation beyond 1 in its merge; the oracle is asked about all other layers.
PLAIN = ("conv_in", "downsample", "shortcut", "to_q", "pooled", r"head\.0")


def test_even_gates_are_a_plain_lora_of_that_rank(toy, images):
    model, report = toy.make(toy.small("mor_v1", num_shared=2, top_k=10, targets=PLAIN, scale=2.0))
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=[name.replace("\\", "") for name in PLAIN])
    twin = peft.get_peft_model(toy.bare(), config).eval()
    with torch.no_grad():
        for name, _, ranks in layers_of_set(model, "generator"):
            theirs = twin.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(ranks.lora_A)
            theirs.lora_B["default"].weight.copy_(ranks.lora_B.view_as(theirs.lora_B["default"].weight))
        torch.nn.init.zeros_(report.router.weight)
        torch.nn.init.zeros_(report.router.bias)
        report.route(torch.rand(3, toy.SCORES))
        torch.testing.assert_close(model(images), twin(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_the_routing_of_one_image_loads_in_peft(toy, images, scores, tmp_path, strength):
    model, report = toy.make(toy.small(targets=PLAIN, scale=0.5))
    report.strength = strength
    report.route(scores[:1])
    export_peft(tmp_path, model)
    twin = peft.PeftModel.from_pretrained(toy.bare(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported(toy, scores):
    model, report = toy.make()
    with pytest.raises(InputError):
        lora_state_dict(model)
    report.route(scores)
    with pytest.raises(InputError):
        lora_state_dict(model)
