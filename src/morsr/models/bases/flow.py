"""What flow-matching transformers share: z_t = (1 − σ) z0 + σ n, v = n − z0, and z0 = z_t − σ v."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError
from morsr.functional.diffusion import flow_clean, flow_noised
from morsr.models.bases.base import STEPS, Base, Condition, at_timesteps, dtype_of
from morsr.models.bases.reading import check_parts, read_autoencoder, read_json, read_network
from morsr.models.precision import to_float32


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

    transformer: Any
    sigmas: Tensor

    def __init__(self, transformer: nn.Module, vae: nn.Module, *, shift: float = 1.0, **common: Any) -> None:
        super().__init__(transformer, vae, **common)
        to_float32(self.transformer.get_submodule(self.last_layer))
        self.shift = shift
        u = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
        self.register_buffer("sigmas", (shift * u / (1 + (shift - 1) * u)).float(), persistent=False)

    @classmethod
    def parts(cls, folder: Path) -> dict[str, Any]:
        """Arguments of the class from a diffusers folder, prompts left out; see `load_base`."""
        check_parts(folder, "vae", "transformer", "scheduler")
        kind = read_json(folder / "transformer" / "config.json").get("_class_name")
        if kind != cls.network_class:
            raise ConfigError(f"{folder}: expected an {cls.network_class} in transformer/, got {kind}")
        shift = read_shift(folder / "scheduler" / "scheduler_config.json")
        vae = read_autoencoder(folder, cls.autoencoder, shift=True)
        return {"transformer": read_network(kind, folder / "transformer"), "vae": vae, "shift": shift}

    @property
    def text_width(self) -> int:
        return int(self.transformer.config.joint_attention_dim)

    @property
    def multiple(self) -> int:
        """The autoencoder's factor times the two latents of a token."""
        return self.latent_factor * 2

    @property
    def width(self) -> int:
        """Channels of an image token inside the transformer."""
        return int(self.transformer.inner_dim)

    def blocks(self) -> list[Any]:
        """The transformer's blocks in their order."""
        single = getattr(self.transformer, "single_transformer_blocks", ())
        return [*self.transformer.transformer_blocks, *single]

    def watched(self) -> list[nn.Module]:
        """Blocks whose image tokens are the features: a quarter, half and three quarters of the depth, and the last."""
        blocks = self.blocks()
        depths = sorted({math.ceil(len(blocks) * share) - 1 for share in (0.25, 0.5, 0.75, 1.0)})
        return [blocks[depth] for depth in depths]

    @property
    def feature_widths(self) -> list[int]:
        return [self.width] * len(self.watched())

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's output (B, C, h, w) for latents in its precision and σ (B,)."""
        raise NotImplementedError

    def tokens_shape(self, z_t: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        raise NotImplementedError

    def image_tokens(self, tokens: Tensor, count: int) -> Tensor:
        """The tokens of the image in what a block gives; in one sequence with the text they come last."""
        return tokens[:, tokens.shape[1] - count :]

    def predict(self, z_t: Tensor, t: Tensor | int, condition: Condition | None = None) -> Tensor:
        condition, dtype = condition or self.condition(), dtype_of(self.transformer)
        tokens = condition.tokens.to(dtype).expand(len(z_t), -1, -1)
        pooled = None if condition.pooled is None else condition.pooled.to(dtype).expand(len(z_t), -1)
        output = self.velocity(z_t.to(dtype), self.sigmas[at_timesteps(z_t, t)], Condition(tokens, pooled))
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
        rows, columns = self.tokens_shape(z_t)
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            tokens = output[-1] if isinstance(output, tuple) else output  # (text, image), or one joint sequence
            image = self.image_tokens(tokens, rows * columns)
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


def read_shift(path: Path) -> float:
    """The shift of a flow-matching scheduler; one that grows with the image is taken at its largest.

    Raises:
        ConfigError: another kind of scheduler.
    """
    config: Mapping[str, Any] = read_json(path)
    if config.get("use_flow_sigmas"):  # a solver of diffusion models that runs a flow, as Sana's
        return float(config.get("flow_shift", 1.0))
    kind = str(config.get("_class_name"))
    if not kind.startswith("FlowMatch") or config.get("num_train_timesteps", STEPS) != STEPS:
        raise ConfigError(f"{path}: expected a flow-matching schedule of {STEPS} steps, got {kind}")
    if config.get("use_dynamic_shifting"):
        return math.exp(float(config.get("max_shift", 1.15)))
    return float(config.get("shift", 1.0))
