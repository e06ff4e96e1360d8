"""A router that starts with readable slots: each real one answers to more or less of one score."""

import torch

from morsr.adapters import MoRConfig, Router


class ByKind(Router):
    """Slot 2 i weighs score i by +0.5, slot 2 i + 1 by -0.5, in turn over the scores; zero slots start as usual."""

    def __init__(self, config: MoRConfig, num_layers: int, num_scores: int) -> None:
        super().__init__(config, num_layers, num_scores)
        with torch.no_grad():
            for slot in range(config.num_experts):
                self.weight[:, slot, slot // 2 % num_scores] += 0.5 if slot % 2 == 0 else -0.5
