"""What flow-matching transformers share: z_t = (1 − σ) z0 + σ n, v = n − z0, and z0 = z_t − σ v."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError
from morsr.functional.diffusion import flow_clean, flow_noised
from morsr.models.bases.base import STEPS, Base, Condition, dtype_of, to_float32
from morsr.models.bases.reading import read_json


class Flow(Base):
    """A transformer that predicts the velocity of a flow.

    Its last projection stays in float32. Timesteps 0..999 stand for σ from low to 1 along the scheduler's shift.

    Args:
        transformer: predicts the velocity.
        vae: a diffusers autoencoder.
        shift: of the schedule, σ = s u / (1 + (s − 1) u) with u = (t + 1) / 1000.
        common: as for `Base`.
    """

    last_layer: ClassVar[str] = "proj_out"
    """Name of the transformer's last projection."""
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    """Names of the transformer's lists of blocks, in their order."""
    patch: ClassVar[int] = 2
    """Latents of a token along each axis."""
    image_first: ClassVar[bool] = False
    """Whether the tokens of the image come before those of the text where both are in one sequence."""
    text_width = "joint_attention_dim"

    transformer: Any
    sigmas: Tensor

    def __init__(self, transformer: nn.Module, vae: nn.Module, *, shift: float = 1.0, **common: Any) -> None:
        super().__init__(transformer, vae, **common)
        to_float32(self.transformer.get_submodule(self.last_layer))
        self.shift = shift
        u = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
        self.register_buffer("sigmas", (shift * u / (1 + (shift - 1) * u)).float(), persistent=False)

    @classmethod
    def schedule(cls, path: Path) -> dict[str, Any]:
        """The shift; one that grows with the image is taken at its largest.

        Raises:
            ConfigError: another kind of scheduler.
        """
        config = read_json(path)
        if config.get("use_flow_sigmas"):  # a solver of diffusion models that runs a flow, as Sana's
            return {"shift": config.get("flow_shift", 1.0)}
        kind = str(config.get("_class_name"))
        if not kind.startswith("FlowMatch") or config.get("num_train_timesteps", STEPS) != STEPS:
            raise ConfigError(f"{path}: expected a flow-matching schedule of {STEPS} steps, got {kind}")
        if config.get("use_dynamic_shifting"):
            return {"shift": math.exp(config.get("max_shift", 1.15))}
        return {"shift": config.get("shift", 1.0)}

    @property
    def multiple(self) -> int:
        """The autoencoder's factor times the latents of a token."""
        return self.latent_factor * self.patch

    def watched(self) -> list[nn.Module]:
        """Blocks whose image tokens are the features: a quarter, half and three quarters of the depth, and the last."""
        blocks = [block for name in self.block_lists for block in getattr(self.transformer, name, ())]
        depths = sorted({math.ceil(len(blocks) * share) - 1 for share in (0.25, 0.5, 0.75, 1.0)})
        return [blocks[depth] for depth in depths]

    @property
    def feature_widths(self) -> list[int]:
        return [self.transformer.get_submodule(self.last_layer).in_features] * len(self.watched())

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's output (B, C, h, w) for latents in its precision and σ (B,)."""
        raise NotImplementedError

    def predict(self, z_t: Tensor, t: Tensor | int, condition: Condition | None = None) -> Tensor:
        condition, dtype = condition or self.condition(), dtype_of(self.transformer)
        tokens = condition.tokens.to(dtype).expand(len(z_t), -1, -1)
        pooled = None if condition.pooled is None else condition.pooled.to(dtype).expand(len(z_t), -1)
        sigma = self.sigmas[torch.as_tensor(t, device=z_t.device).expand(len(z_t))]
        output = self.velocity(z_t.to(dtype), sigma, Condition(tokens, pooled))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def signal(self, t: Tensor | int) -> Tensor:
        return 1 - self.sigmas[t]

    def noised(self, z0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        return flow_noised(z0, noise, self.sigmas[t])

    def target(self, z0: Tensor, noise: Tensor) -> Tensor:
        return noise - z0.float()

    def clean_from(self, z_t: Tensor, prediction: Tensor, t: Tensor | int) -> Tensor:
        return flow_clean(z_t, prediction, self.sigmas[t])

    def features(self, z_t: Tensor, t: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """Image tokens after the blocks of `watched`, as maps."""
        rows, columns = (side // self.patch for side in z_t.shape[-2:])
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            tokens = output[-1] if isinstance(output, tuple) else output  # (text, image), or one joint sequence
            image = tokens[:, : rows * columns] if self.image_first else tokens[:, -rows * columns :]
            found.append(image.transpose(1, 2).unflatten(2, (rows, columns)))

        hooks = [block.register_forward_hook(keep) for block in self.watched()]
        try:
            self.predict(z_t, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.shift)
