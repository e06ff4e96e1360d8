"""Five steps of the real training equal the page of plain PyTorch in experiments/train_minimal.py, term by term.

`python tests/net/test_golden_step.py` writes `golden_step.json` anew; do so only when the method changes on purpose.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

FILE = Path(__file__).with_name("golden_step.json")
Numbers = list[dict[str, float]]


def load_page() -> ModuleType:
    """experiments/train_minimal.py as a module."""
    path = Path(__file__).resolve().parents[2] / "experiments" / "train_minimal.py"
    spec = importlib.util.spec_from_file_location("train_minimal", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def named(terms: dict[str, float], norms: dict[str, float]) -> dict[str, float]:
    """One step's numbers, the norms of the gradients as |network|."""
    return {**terms, **{f"|{network}|": norm for network, norm in norms.items()}}


class PageDraws:
    """The page's random numbers of one step, as the training asks for them."""

    def __init__(self, page: ModuleType, step: int, count: int) -> None:
        self.page, self.step, self.count = page, step, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, images: slice) -> PageDraws:
        return self  # the batch is one part

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.page.draw(self.step, name, self.count, *shape)

    def timesteps(self, name: str, low: int, high: int) -> Tensor:
        return self.page.draw_timesteps(self.step, name, self.count, low, high)


def save_base(page: ModuleType, method: Any, folder: Path) -> None:
    """The page's base as the diffusers folder that it would come from, with both prompts."""
    from diffusers import DDPMScheduler
    from safetensors.torch import save_file

    for name, network in (("unet", page.UNet2DConditionModel(**page.UNET)), ("vae", page.AutoencoderKL(**page.VAE))):
        state = method.base[name].state_dict()
        network.load_state_dict({key.replace(".base.", "."): state[key] for key in state if ".sets." not in key})
        network.save_pretrained(folder / name)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(**betas).save_pretrained(folder / "scheduler")
    prompts = {"clean": method.clean_prompt[None], "degraded": method.degraded_prompt[None]}
    save_file({key: value.reshape(1, 1, -1).contiguous() for key, value in prompts.items()},
              folder / "prompt_embeddings.safetensors")  # fmt: skip


def real_steps(page: ModuleType, method: Any, folder: Path) -> Numbers:
    """The numbers of the real training from the page's initial values: the one place here that knows its insides."""
    import training_twins

    import morsr.training.module as real
    from morsr.adapters import MoRConfig, adapter_parameters
    from morsr.estimators.base import DegradationEstimator
    from morsr.models.losses import Distillation, Gan, Losses, Weight

    class PageEstimator(DegradationEstimator):
        names = ("rows", "columns", "flatness")

        def estimate(self, lr: Tensor) -> Tensor:
            return page.estimate(lr)

    estimator = PageEstimator()
    teacher: Any = {"guidance": page.GUIDANCE, "low": page.SCORE_RANGE[0], "high": page.SCORE_RANGE[1]}
    save_base(page, method, folder)
    module = real.OneStepSRModule(
        base=str(folder), estimator=estimator,
        adapters=MoRConfig(
            num_ranks=page.RANKS, num_shared=page.SHARED, top_k=page.TOP_K, num_zero=page.ZERO, gate=method.gate,
            targets=tuple(method.layers), balance_alpha=page.ALPHA, balance_window=page.WINDOW,
            logit_noise=page.NOISE, logit_noise_until=page.NOISE_UNTIL,
        ),
        one_step=real.OneStepConfig(timestep=page.TIMESTEP),
        losses=Losses(
            **{name: Weight(weight=page.WEIGHTS[name]) for name in page.WEIGHTS if name not in ("vsd", "csd", "gan")},
            csd=Distillation(weight=page.WEIGHTS["csd"], **teacher),
            vsd=Distillation(
                weight=page.WEIGHTS["vsd"], rank=page.SCORE_RANK, scale=page.SCORE_SCALE, lr=page.HELPER_LR, **teacher,
                targets=tuple(name for name in method.layers if name.startswith("unet")),
            ),
            gan=Gan(
                weight=page.WEIGHTS["gan"], width=page.WIDTH, max_timestep=page.GAN_RANGE[1], lr=page.HELPER_LR
            ),
        ),
        lr=page.LR, router_lr_scale=page.ROUTER_LR_SCALE, weight_decay=page.WEIGHT_DECAY, clip=page.CLIP,
    )  # fmt: skip
    base, adapters = module.generator.base, module.generator.adapters
    assert list(adapters.layer_names) == list(method.layers)
    theirs = {name: adapter_parameters(base, name) for name in ("generator", "score")}
    theirs["discriminator"] = list(module.discriminator.parameters())
    for name, parameters in theirs.items():
        for mine, yours in zip(method.networks[name], parameters, strict=True):
            # The page keeps (R, O) where the field's lora_B is (O, R).
            yours.data.copy_(
                mine.data if mine.shape == yours.shape and not is_up(name, mine, method) else mine.data.t()
            )
    adapters.router.standardize(method.mean, method.std, page.SEVERITIES)
    phase = training_twins.plain_phase(module, clip=page.CLIP)
    found = []
    for step in range(page.STEPS):
        adapters.router.noise_sigma = module.adapters.noise_at(step / page.STEPS)
        lr, hr = page.pairs(step)
        report = phase.run({"lr": lr, "hr": hr}, PageDraws(page, step, len(lr)), step=step)
        terms = {name: term.item() for name, term in report.terms.items()}
        found.append(named({**terms, "total": report.total.item()}, {n: v.item() for n, v in report.norms.items()}))
    return found


def is_up(name: str, parameter: Any, method: Any) -> bool:
    """Whether a parameter of the page is a layer's (R, O) factor."""
    ups = [value for layer in method.layers.values() for key, value in layer.sets.items() if key == f"{name}_up"]
    return any(parameter is up for up in ups)


def page_steps(page: ModuleType, method: Any) -> Numbers:
    return [named(*method.step(step)) for step in range(page.STEPS)]


def differences(first: Numbers, second: Numbers) -> dict[str, float]:
    """Largest difference of each number over the steps, relative above 1 and absolute below."""
    assert len(first) == len(second)
    worst: dict[str, float] = {}
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            worst[name] = max(worst.get(name, 0.0), abs(one[name] - other[name]) / max(1.0, abs(other[name])))
    return worst


def both(gate: str, steps: int, folder: Path) -> tuple[Numbers, Numbers]:
    """The numbers of the real training and of the page, from the same start."""
    page = load_page()
    page.STEPS = steps
    method = page.Method(gate=gate)
    return real_steps(page, method, folder), page_steps(page, method)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return both("renormalize_real", load_page().STEPS, tmp_path_factory.mktemp("golden"))


def check(numbers: tuple[Numbers, Numbers]) -> None:
    worst = differences(*numbers)
    assert {name: value for name, value in worst.items() if value > (1e-4 if "|" in name else 1e-5)} == {}


def test_the_real_training_equals_the_page(golden):
    check(golden)


@pytest.mark.parametrize("gate", ["softmax", pytest.param("renormalize", marks=pytest.mark.slow)])
def test_it_does_so_with_other_gates(gate, tmp_path):
    """The router learns from the second step on."""
    check(both(gate, 2, tmp_path))


def test_the_page_gives_the_numbers_on_file(golden):
    worst = differences(golden[1], json.loads(FILE.read_text()))
    assert {name: value for name, value in worst.items() if value > 1e-4} == {}


def test_the_page_runs_by_itself(capsys):
    page = load_page()
    page.STEPS = 1
    page.main()
    assert len(capsys.readouterr().out.splitlines()) == 2


if __name__ == "__main__":
    the_page = load_page()
    FILE.write_text(json.dumps(page_steps(the_page, the_page.Method()), indent=1) + "\n")
