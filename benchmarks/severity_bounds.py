"""How well could anybody rank the combined severity of a recipe's images, knowing only what the image can show?

    python benchmarks/severity_bounds.py

A network is given some of the drawn parameters exactly, in place of an image, and learns the combined severity from
them; its rank correlation on draws that it has not seen bounds that of every estimator which sees no more. The first
JPEG lies under a blur, noise and two resizes; the second one can be read exactly only where it comes last.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from morsr.degradation import DegradationRecipe, sample_keys, true_severity
from morsr.training.estimator import spearman


def learned_correlation(inputs: Tensor, target: Tensor, *, held_out: int, steps: int) -> float:
    """Spearman's correlation on the last `held_out` rows of a network that was trained on the others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs.shape[1], 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (net(inputs[:-held_out])[:, 0] - target[:-held_out]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float(spearman(net(inputs[-held_out:])[:, 0], target[-held_out:]))


def main(arguments: list[str] | None = None) -> int:
    """Print one line per state of knowledge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="realesrgan")
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    parameters = DegradationRecipe.load(options.recipe).sample(sample_keys(7, 0, torch.arange(options.draws)))
    truth = true_severity(parameters, options.recipe)
    second, last = parameters.second.jpeg_quality / 100, parameters.final.jpeg_last.float()
    noisy = torch.Generator().manual_seed(0)

    def near(rank: Tensor) -> Tensor:
        """The rank with an error that leaves a correlation of about 0.9."""
        return rank + 0.14 * torch.randn(rank.shape, generator=noisy)

    states = {
        "blur, noise, resize and the second JPEG's quality exactly": [*truth[:2], truth.resize, second],
        "the same, the quality only where that JPEG comes last": [*truth[:2], truth.resize, second * last, last],
        "the same, without the resize": [*truth[:2], second * last, last],
        "blur and noise alone": [*truth[:2]],
        "blur, noise, resize at .9 each, the quality where last": [
            near(truth.blur), near(truth.noise), near(truth.resize), second * last, last,
        ],
    }  # fmt: skip
    for name, known in states.items():
        value = learned_correlation(
            torch.stack(known, dim=1).float() - 0.5, truth.combined, held_out=options.draws // 5, steps=options.steps
        )
        print(f"{name:60} {value:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
