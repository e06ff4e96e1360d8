"""Which ranks run for which image: the routing of many images as one table, with its statistics and its file.

Gates need the degradation scores alone, so a table over thousands of images runs no UNet.
Dimensions: I images, L layers, K chosen slots, N slots (real experts first, then zero experts), D scores, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.evaluation.inputs import device_of, image_batches, image_name, true_severities, unique_names
from morsr.evaluation.specialisation import Specialisation, specialise
from morsr.files import save_tensors
from morsr.functional.routing import slot_load
from morsr.functional.utilization import active_ranks, load_share, mid_ranks, zero_share

FORMAT = "morsr-routing-1"
SEVERITY_NAMES = ("light", "medium", "severe")


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
        truth: known severities per image by kind of degradation, each (I,); empty where nothing is known.
        labels: a known kind per image; empty where nothing is known.
        parameters: the drawn degradation of each image as one line of JSON; empty where it is not known.

    A model that routes nothing has no layers here: L = K = N = 0, and only scores and severities.
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
    expert_rank: int = 1
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @classmethod
    @torch.no_grad()
    def from_images(
        cls,
        model: Any,
        images: Tensor | Sequence[Any],
        parameters: Any = None,
        *,
        recipe: DegradationRecipe | str = "realesrgan",
        labels: Sequence[str] = (),
        names: Sequence[str] = (),
        batch_size: int = 16,
        scores_only: bool = False,
    ) -> RoutingTable:
        """Route images with the estimator and the router alone.

        Args:
            model: a Restorer, a LightningModule with a `generator`, or a OneStepGenerator.
            images: LR images: a tensor (I, 3, H, W) in [0, 1], or a sequence of paths, PIL images, arrays or tensors,
                whose sizes may differ.
            parameters: what is known of the degradations: DegradationParameters, or severities (I,) in [0, 1] by kind
                (a mapping, or what `true_severity` gives); None where nothing is known.
            recipe: the recipe that DegradationParameters were drawn from.
            labels: kind of degradation per image, where it is known outright; goes before `parameters`.
            names: names of the images; by default paths keep their stems and others are numbered.
            batch_size: images of one size that are scored together.
            scores_only: accept a model that routes nothing (a plain LoRA), for its degradation scores alone.

        Raises:
            ConfigError: the model routes nothing, or has no estimator either.
            InputError: no image, an unreadable one, or parameters, labels or names of another length.
        """
        generator = getattr(model, "generator", model)
        adapters = getattr(generator, "adapters", None)
        routed = adapters is not None and adapters.config.is_routed
        if not (routed or scores_only):
            raise ConfigError(
                "this model has no routing: it is a base model or a plain LoRA, whose ranks always all run"
            )
        if generator.estimator is None:
            raise ConfigError("this model has neither routing nor a degradation estimator: there is nothing to show")
        count = len(images)
        if not count:
            raise InputError("expected at least one image, got none")
        truth = true_severities(parameters, recipe, count)
        for what, given in (("labels", labels), ("names", names)):
            if given and len(given) != count:
                raise InputError(f"{what}: expected {count}, one per image, got {len(given)}")
        drawn = tuple(parameters.to_jsonl().splitlines()) if isinstance(parameters, DegradationParameters) else ()
        scored, routings = [], []
        training = routed and adapters.router.training
        if routed:
            adapters.router.eval()  # in training mode the router would add its noise
        try:
            for batch in image_batches(images, batch_size, device_of(generator)):
                scored.append(generator.estimator(batch))
                # Asked for without being set: a restorer in the middle of a sequence keeps its own routing.
                routings += [adapters.router(scored[-1].scores)] if routed else []
        finally:
            if routed:
                adapters.router.train(training)
        config = adapters.config if routed else None
        nothing = torch.zeros(count, 0, 0)
        choices = {
            "chosen": torch.cat([routing.chosen.transpose(0, 1) for routing in routings]).cpu(),
            "gates": torch.cat([routing.selected.transpose(0, 1) for routing in routings]).float().cpu(),
        } if routed else {"chosen": nothing.long(), "gates": nothing}  # fmt: skip
        return cls(
            names=tuple(names) or tuple(image_name(images[index], index) for index in range(count)),
            layer_names=tuple(adapters.layer_names) if routed else (),
            score_names=tuple(scored[0].names),
            scores=torch.cat([part.scores for part in scored]).float().cpu(),
            severity=torch.cat([part.severity for part in scored]).float().cpu(),
            **choices,
            num_slots=config.num_slots if config else 0,
            num_zero=config.num_zero if config else 0,
            num_shared=config.num_shared if config else 0,
            expert_rank=config.expert_rank if config else 1,
            truth=truth,
            labels=tuple(labels),
            parameters=drawn,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_routed(self) -> bool:
        """Whether there is any routing in the table."""
        return bool(self.layer_names)

    @property
    def num_real(self) -> int:
        """Slots that are real experts; the others are zero experts."""
        return self.num_slots - self.num_zero

    @property
    def top_k(self) -> int:
        """Slots that each image chooses in each layer."""
        return self.chosen.shape[2]

    @property
    def kinds_are_known(self) -> bool:
        """Whether `kinds` comes from known degradations and not from the estimator's scores."""
        return bool(self.labels or self.truth)

    def kinds(self) -> tuple[str, ...]:
        """One kind of degradation per image.

        The labels where they are given; else the known severity that stands highest among all images of the table, by
        rank, so that a scale that runs higher than others does not win every time; else the same of the scores.
        """
        if self.labels:
            return self.labels
        columns = dict(self.truth) or dict(zip(self.score_names, self.scores.unbind(1), strict=True))
        varying = {name: values for name, values in columns.items() if values.max() > values.min()}
        if not varying:
            return ("all alike",) * len(self)
        places = torch.stack([mid_ranks(values) for values in varying.values()], dim=1)
        names = list(varying)
        return tuple(names[index] for index in places.argmax(1).tolist())

    def severity_groups(self) -> tuple[str, ...]:
        """light, medium or severe for each image: thirds of the table by severity; equal severities stay together."""
        places = (mid_ranks(self.severity) - 0.5) / len(self)
        return tuple(SEVERITY_NAMES[min(2, int(place * 3))] for place in places.tolist())

    def zero_share(self) -> Tensor:
        """Share (I, L) of the places that went to zero experts."""
        return zero_share(self.chosen, self.num_real)

    def active_ranks(self) -> Tensor:
        """Ranks (I, L) that run."""
        return active_ranks(self.zero_share(), self.top_k, self.num_shared, expert_rank=self.expert_rank)

    def loads(self, images: Tensor | None = None) -> Tensor:
        """Share of choices (L, N), of all images or of those that a boolean (I,) names."""
        chosen = self.chosen if images is None else self.chosen[images]
        return load_share(slot_load(chosen.transpose(0, 1), self.num_slots))

    def heatmap(self, by: str | None = None) -> tuple[tuple[str, ...], Tensor]:
        """Loads for a heat map of layers x slots.

        Args:
            by: None, "kind" or "severity".

        Returns:
            Names of the G groups and their loads (G, L, N).

        Raises:
            InputError: another grouping.
        """
        if by is None:
            return ("all images",), self.loads()[None]
        if by not in ("kind", "severity"):
            raise InputError(f'by: expected None, "kind" or "severity", got {by!r}')
        groups = self.kinds() if by == "kind" else self.severity_groups()
        names = tuple(sorted(set(groups), key=SEVERITY_NAMES.index if by == "severity" else None))
        members = [torch.tensor([group == name for group in groups]) for name in names]
        return names, torch.stack([self.loads(images) for images in members])

    def specialisation(self) -> Specialisation:
        """Which slots are chosen for which kind of degradation.

        Raises:
            InputError: all images are of one kind, or there are fewer than 8.
        """
        return specialise(self.chosen, self.kinds(), self.num_slots)

    def to_dataframe(self) -> Any:
        """One row per image, layer and chosen slot: image, layer, slot, is_zero, gate, severity, kind, scores, truth.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("to_dataframe needs pandas: pip install 'morsr[report]'") from error
        images, layers, places = self.chosen.shape
        row = torch.arange(images).repeat_interleave(layers * places).numpy()
        layer = torch.arange(layers).repeat_interleave(places).repeat(images).numpy()
        frame = {
            "image": pandas.Categorical.from_codes(row, unique_names(self.names)),
            "layer": pandas.Categorical.from_codes(layer, list(self.layer_names)),
            "slot": self.chosen.flatten().numpy(),
            "is_zero": (self.chosen >= self.num_real).flatten().numpy(),
            "gate": self.gates.flatten().numpy(),
            "severity": self.severity.numpy()[row],
            "kind": pandas.Categorical([*self.kinds()])[row],
        }
        frame |= {f"score_{name}": self.scores[:, index].numpy()[row] for index, name in enumerate(self.score_names)}
        frame |= {f"true_{name}": values.numpy()[row] for name, values in self.truth.items()}
        return pandas.DataFrame(frame)

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file; the file appears whole or not at all."""
        path = Path(path)
        tensors = {
            "scores": self.scores,
            "severity": self.severity,
            "chosen": self.chosen.to(torch.int16),
            "gates": self.gates,
            **{f"truth.{name}": values.float() for name, values in self.truth.items()},
        }
        facts = {
            "names": self.names,
            "layer_names": self.layer_names,
            "score_names": self.score_names,
            "labels": self.labels,
            "parameters": self.parameters,
            "truth": list(self.truth),
            "num_slots": self.num_slots,
            "num_zero": self.num_zero,
            "num_shared": self.num_shared,
            "expert_rank": self.expert_rank,
        }
        ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(path, ready, {"format": FORMAT, "table": json.dumps(facts)})

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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as a routing table ({error})") from error
        return cls(
            **{name: tuple(facts[name]) for name in ("names", "layer_names", "score_names", "labels")},  # type: ignore[arg-type]
            **{name: facts[name] for name in ("num_slots", "num_zero", "num_shared", "expert_rank")},
            **{name: tensors[name] for name in ("scores", "severity", "gates")},
            chosen=tensors["chosen"].long(),
            truth={name: tensors[f"truth.{name}"] for name in facts["truth"]},
            parameters=tuple(facts.get("parameters", ())),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[RoutingTable]) -> RoutingTable:
        """One table of several that one model made.

        Raises:
            InputError: nothing to join, or tables of different models or different knowledge.
        """
        if not parts:
            raise InputError("expected at least one table, got none")
        first = parts[0]
        same = ("layer_names", "score_names", "num_slots", "num_zero", "num_shared", "expert_rank")
        for part in parts[1:]:
            differ = [name for name in same if getattr(part, name) != getattr(first, name)]
            differ += ["truth"] * (part.truth.keys() != first.truth.keys())
            differ += [
                name for name in ("labels", "parameters") if bool(getattr(part, name)) != bool(getattr(first, name))
            ]
            if differ:
                raise InputError(f"tables differ in {', '.join(differ)} and cannot be joined")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in
                  ("scores", "severity", "chosen", "gates")}  # fmt: skip
        return cls(
            **{name: getattr(first, name) for name in same},
            **joined,  # type: ignore[arg-type]
            names=tuple(name for part in parts for name in part.names),
            labels=tuple(label for part in parts for label in part.labels),
            parameters=tuple(line for part in parts for line in part.parameters),
            truth={name: torch.cat([part.truth[name] for part in parts]) for name in first.truth},
        )


def common_knowledge(parts: Sequence[RoutingTable]) -> list[RoutingTable]:
    """The tables without the true severities and the drawn degradations, unless all have them."""
    lost: dict[str, Any] = {} if all(part.truth for part in parts) else {"truth": {}}
    if lost or not all(part.parameters for part in parts):
        lost["parameters"] = ()
    return [replace(part, **lost) for part in parts]
