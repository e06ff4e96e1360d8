"""Which ranks run for which image: the routing of many images as one table, with its statistics, plot and file.

Gates need the degradation scores alone, so a table over thousands of images runs no UNet.
Dimensions: I images, L layers, K chosen slots, N slots (real experts first, then zero experts), D scores, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.degradation.severity import true_severity
from morsr.errors import ConfigError, InputError
from morsr.evaluation.specialisation import Specialisation, specialise
from morsr.files import save_tensors
from morsr.functional.routing import effective_ranks, gate_mass, slot_load
from morsr.functional.severity import rank
from morsr.functional.utilization import load_share, zero_share
from morsr.imaging.figures import load_figure
from morsr.imaging.files import read_planes

FORMAT = "morsr-routing-1"
SEVERITY_NAMES = ("light", "medium", "severe")
_COMPOSITE = ("combined", "overall", "worst")  # no kinds: they would win or lose against their own parts
_TUPLES = ("names", "layer_names", "score_names")
_TENSORS = ("scores", "severity", "chosen", "gates", "update")
_NUMBERS = ("num_slots", "num_zero", "num_shared", "expert_rank")


@dataclass(frozen=True, kw_only=True)
class RoutingTable:
    """The routing of I images.

    Attributes:
        names: one name per image.
        layer_names: L names.
        score_names: D names.
        scores: (I, D) in [0, 1].
        severity: (I,) in [0, 1].
        chosen: (I, L, K) int64 slots.
        gates: (I, L, K) factor of each chosen slot.
        num_slots, num_zero, num_shared, expert_rank: of the adapter.
        update: (I, L) size of the routed update over that of the shared ranks.
        truth: known severities per image by kind of degradation, each (I,); empty where nothing is known.
    """

    names: tuple[str, ...]
    layer_names: tuple[str, ...]
    score_names: tuple[str, ...]
    scores: Tensor
    severity: Tensor
    chosen: Tensor
    gates: Tensor
    num_slots: int
    num_zero: int
    num_shared: int
    expert_rank: int
    update: Tensor
    truth: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def from_images(
        cls,
        model: Any,
        images: Tensor | Sequence[Any],
        parameters: Any = None,
        *,
        recipe: DegradationRecipe | str = "realesrgan",
        names: Sequence[str] = (),
        batch_size: int = 16,
    ) -> RoutingTable:
        """Route images with the estimator and the router alone.

        Args:
            model: a Restorer, a LightningModule with a `generator`, or a OneStepGenerator.
            images: LR images: a tensor (I, 3, H, W) in [0, 1], or a sequence of paths, PIL images, arrays or tensors,
                whose sizes may differ.
            parameters: what is known of the degradations: DegradationParameters, or severities (I,) in [0, 1] by kind
                (a mapping, or what `true_severity` gives); None where nothing is known.
            recipe: the recipe that DegradationParameters were drawn from.
            names: names of the images; by default paths keep their stems and others are numbered.
            batch_size: images of a tensor that are scored together.

        Raises:
            ConfigError: a model without routing.
            InputError: no image, an unreadable one, or parameters or names of another length.
        """
        generator = getattr(model, "generator", model)
        adapters, count = generator.adapters, len(images)
        if adapters is None or not adapters.is_routed:
            raise ConfigError("this model has no routing: its ranks are all active for every image")
        if not count or (names and len(names) != count):
            raise InputError(f"routing: expected images and a name for each, got {count} and {len(names)} names")
        truth = _true_severities(parameters, recipe, count, generator)
        tensors = images.split(batch_size) if isinstance(images, Tensor) else map(_planes, images)
        device = next(generator.parameters(), torch.empty(0)).device
        scored, routings = [], []
        training = adapters.router.training
        adapters.router.eval()  # in training mode the router adds noise
        try:
            for batch in tensors:
                scored.append(generator.estimator(batch.to(device)))
                # asked without being set: a model in the middle of a sequence keeps its own routing
                routings.append(adapters.router(scored[-1].scores))
        finally:
            adapters.router.train(training)
        default = (Path(i).stem if isinstance(i, (str, Path)) else f"{n:05d}" for n, i in enumerate(images))
        return cls(
            names=tuple(names) or tuple(default),
            layer_names=tuple(adapters.layer_names),
            score_names=tuple(scored[0].names),
            scores=torch.cat([part.scores for part in scored]).float().cpu(),
            severity=torch.cat([part.severity for part in scored]).float().cpu(),
            chosen=torch.cat([routing.chosen.transpose(0, 1) for routing in routings]).cpu(),
            gates=torch.cat([routing.selected.transpose(0, 1) for routing in routings]).float().cpu(),
            update=torch.cat([adapters.routed_update(routing).T for routing in routings]).cpu(),
            truth=truth,
            **{name: getattr(adapters.config, name) for name in _NUMBERS},
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_real(self) -> int:
        """Slots that are real experts; the others are zero experts."""
        return self.num_slots - self.num_zero

    @property
    def top_k(self) -> int:
        """Slots that each image chooses in each layer."""
        return self.chosen.shape[2]

    def kinds(self) -> tuple[str, ...]:
        """One kind of degradation per image: the known severity, else the score, that is highest among all images.

        By rank, so that a scale that runs higher than others does not win every time.
        """
        names, places = self._places()
        return tuple(names[index] for index in places.argmax(1).tolist()) if names else ("all alike",) * len(self)

    def typical(self) -> dict[str, int]:
        """For each kind, the place of the image that shows it most clearly: its rank over the mean of other ranks."""
        names, places = self._places()
        if len(names) < 2:
            return {}
        others = (places.sum(1, keepdim=True) - places) / (len(names) - 1)
        clarity = (places - others).amax(1).tolist()
        kinds = self.kinds()
        members = {kind: [index for index, one in enumerate(kinds) if one == kind] for kind in sorted(set(kinds))}
        return {kind: max(indices, key=clarity.__getitem__) for kind, indices in members.items()}

    def _places(self) -> tuple[list[str], Tensor]:
        """Kinds whose severities vary, and the rank (I, G) of each image among all by each of them."""
        columns = dict(self.truth) or dict(zip(self.score_names, self.scores.unbind(1), strict=True))
        columns = {name: values for name, values in columns.items() if name not in _COMPOSITE}
        varying = {name: values for name, values in columns.items() if values.max() > values.min()}
        return list(varying), torch.stack([rank(v) for v in varying.values()], 1) if varying else torch.empty(0)

    def severity_groups(self) -> tuple[str, ...]:
        """light, medium or severe for each image: thirds of the table by severity; equal severities stay together."""
        return tuple(SEVERITY_NAMES[min(2, int(place * 3))] for place in rank(self.severity).tolist())

    def zero_share(self) -> Tensor:
        """Share (I, L) of the places that went to zero experts."""
        return zero_share(self.chosen, self.num_real)

    def active_ranks(self) -> Tensor:
        """Ranks (I, L) with a gate: the shared ones and those of the chosen real experts."""
        return self.num_shared + self.top_k * self.expert_rank * (1 - self.zero_share())

    def gate_mass(self) -> Tensor:
        """Sum (I, L) of the gates of real experts; a count of ranks says nothing of it."""
        return gate_mass(self._real_gates(), self.top_k)

    def effective_ranks(self) -> Tensor:
        """Real experts (I, L) that share the gate mass: exp of the entropy of their gates."""
        return effective_ranks(self._real_gates(), self.top_k)

    def loads(self, images: Tensor | None = None) -> Tensor:
        """Share of choices (L, N), of all images or of those that a boolean (I,) names."""
        chosen = self.chosen if images is None else self.chosen[images]
        return load_share(slot_load(chosen.transpose(0, 1), self.num_slots))

    def heatmap(self, by: Literal["kind", "severity"]) -> tuple[tuple[str, ...], Tensor]:
        """Loads of groups of images.

        Returns:
            Names of the G groups and their loads (G, L, N).
        """
        groups = {"kind": self.kinds, "severity": self.severity_groups}[by]()
        names = tuple(sorted(set(groups), key=SEVERITY_NAMES.index if by == "severity" else None))
        members = [torch.tensor([group == name for group in groups]) for name in names]
        return names, torch.stack([self.loads(images) for images in members])

    def slot_order(self) -> Tensor:
        """Order (L, N) of the slots of each layer by the kind that they answer to most; zero experts stay last."""
        loads = self.heatmap("kind")[1][..., : self.num_real]
        excess = (loads - loads.mean(0)).max(0)
        # Excess is below 1, so that it only orders the slots of one kind.
        order = (excess.indices - excess.values).argsort(dim=-1, stable=True)
        zero = torch.arange(self.num_real, self.num_slots).expand(len(order), -1)
        return torch.cat([order, zero], dim=1)

    def plot(self, by: Literal["kind", "severity"] = "kind") -> Any:
        """Heat maps, layers by slots: how often a group of images chooses each slot, minus the mean over the groups.

        Slots are sorted by the kind that they answer to, zero experts on the right. The first panel is the load of all
        images over the even load.

        Args:
            by: how to group the images.

        Returns:
            A matplotlib Figure.
        """
        order, panels = self.slot_order(), {"all images": self.loads() * self.num_slots - 1}
        groups, loads = self.heatmap(by)
        if len(groups) > 1:
            panels |= dict(zip(groups, (loads - loads.mean(0)) * self.num_slots, strict=True))
        return load_figure(
            {name: values.gather(1, order) for name, values in panels.items()}, self.layer_names, self.num_zero,
            label="in even loads: over 1 | over the mean of the groups",
        )  # fmt: skip

    def specialisation(self) -> Specialisation:
        """Which slots are chosen for which kind of degradation."""
        return specialise(self.chosen, self.kinds(), self.num_slots)

    def to_dataframe(self) -> Any:
        """One row per image, layer and chosen slot, with gate, severity, kind, scores and truth; needs pandas."""
        import pandas

        images, layers, places = self.chosen.shape
        row = torch.arange(images).repeat_interleave(layers * places).numpy()
        layer = torch.arange(layers).repeat_interleave(places).repeat(images).numpy()
        frame = {
            "image": np.array(self.names)[row],
            "layer": np.array(self.layer_names)[layer],
            "slot": self.chosen.flatten().numpy(),
            "is_zero": (self.chosen >= self.num_real).flatten().numpy(),
            "gate": self.gates.flatten().numpy(),
            "severity": self.severity.numpy()[row],
            "kind": np.array(self.kinds())[row],
        }
        frame |= {f"score_{name}": self.scores[:, index].numpy()[row] for index, name in enumerate(self.score_names)}
        frame |= {f"true_{name}": values.numpy()[row] for name, values in self.truth.items()}
        return pandas.DataFrame(frame)

    def save(self, path: str | Path) -> None:
        """Write the table atomically as one safetensors file."""
        tensors = {
            **{name: getattr(self, name).contiguous() for name in _TENSORS},
            "chosen": self.chosen.to(torch.int16).contiguous(),
            **{f"truth.{name}": values.float().contiguous() for name, values in self.truth.items()},
        }
        facts = {name: getattr(self, name) for name in (*_TUPLES, *_NUMBERS)}
        save_tensors(path, tensors, {"format": FORMAT, "table": json.dumps({**facts, "truth": list(self.truth)})})

    @classmethod
    def load(cls, path: str | Path) -> RoutingTable:
        """Read a table that `save` wrote.

        Raises:
            InputError: no such file, a damaged one, or one that holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: expected a routing table ({FORMAT}), got {metadata.get('format')!r}")
                facts = json.loads(metadata["table"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                truth = {name: file.get_tensor(f"truth.{name}") for name in facts["truth"]}
            return cls(
                **{name: tuple(facts[name]) for name in _TUPLES},  # type: ignore[arg-type]
                **{name: facts[name] for name in _NUMBERS},
                **tensors | {"chosen": tensors["chosen"].long()},
                truth=truth,
            )
        except (OSError, SafetensorError, LookupError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a routing table ({error})") from error

    def _real_gates(self) -> Tensor:
        return self.gates * (self.chosen < self.num_real)


def _planes(image: Any) -> Tensor:
    return read_planes(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)


def _true_severities(parameters: Any, recipe: DegradationRecipe | str, count: int, generator: Any) -> dict[str, Tensor]:
    """What is known of the degradations as severities by kind, each (I,)."""
    if isinstance(parameters, DegradationParameters):
        parameters = true_severity(parameters, recipe, scale=generator.one_step.scale)
    named = parameters._asdict() if hasattr(parameters, "_asdict") else parameters or {}
    truth = {name: torch.as_tensor(values).float().cpu() for name, values in named.items() if name not in _COMPOSITE}
    for name, values in truth.items():
        if values.shape != (count,) or not values.isfinite().all():
            raise InputError(f"parameters: {name}: expected {count} finite severities, got shape {tuple(values.shape)}")
    return truth
