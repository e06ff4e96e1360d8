"""The routing of many images as one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from morsr.errors import InputError, check_images
from morsr.evaluation.images import to_uint8
from morsr.evaluation.routing import RoutingTable
from morsr.evaluation.specialisation import Specialisation
from morsr.files import write_text
from morsr.functional.utilization import dead_experts, load_entropy, spearman
from morsr.imaging.figures import pixels_of
from morsr.models.generator import OneStepGenerator, enlarge


@dataclass(frozen=True)
class Example:
    """One image in depth.

    Attributes:
        routing: a table of this image alone.
        enlarged, restored, shared: (3, H, W) in [0, 1]: bicubic, with all its ranks, by the shared ranks alone.
    """

    routing: RoutingTable
    enlarged: Tensor
    restored: Tensor
    shared: Tensor


@torch.no_grad()
def examine(generator: OneStepGenerator, lr: Tensor, *, name: str = "image", max_side: int = 96) -> Example:
    """Restore one image with and without its routed ranks.

    Args:
        generator: with routed adapters, in evaluation mode.
        lr: (1, 3, h, w) in [0, 1]; larger images are centre-cropped to max_side for the restored pictures, while scores
            and routing come from the whole.
        name: of the image.
        max_side: longest side of the crop, in LR pixels.

    Raises:
        ConfigError: a generator without routing.
        InputError: not one image.
    """
    table = RoutingTable.from_images(generator, check_images(lr, name="lr"), names=[name])
    crop, adapters, images = centre(lr, max_side), generator.adapters, []
    assert adapters is not None
    kept = adapters.strength
    try:
        for strength in (kept, 0.0):
            adapters.strength = strength
            images.append(generator(crop, scale=generator.one_step.scale, score_lr=lr).sr[0].clamp(0, 1).cpu())
    finally:
        adapters.strength = kept
    return Example(table, enlarge(crop, (images[0].shape[-2], images[0].shape[-1]))[0].cpu(), *images)


def centre(images: Tensor, side: int) -> Tensor:
    """The middle of images (..., h, w), at most `side` pixels each way."""
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + side, left : left + side]


def write_report(
    table: RoutingTable,
    path: str | Path,
    *,
    examples: Sequence[Example] = (),
    kinds: Mapping[str, Tensor] | None = None,
    title: str = "Which ranks are active for which image",
    notes: Sequence[str] = (),
) -> None:
    """Write the report atomically.

    Args:
        table: routing of at least one image.
        path: the HTML file.
        examples: single images in depth, from `examine`.
        kinds: by kind of degradation, an LR image (3, h, w) in [0, 1] that shows it.
        title: heading.
        notes: further lines for the list of what the page cannot show.
    """
    missing = list(notes)
    parts = [_overview(table), _kinds(table, kinds or {}), _load(table), _specialised(table, missing)]
    parts += [_zero(table, missing), *(_example(example, table) for example in examples)]
    if not examples:
        missing.append("Restored pictures with ranks switched off: no image was restored for this page.")
    rows = "".join(f"<li>{html.escape(note)}</li>" for note in missing)
    parts.insert(1, _section("What this page cannot show", f"<ul>{rows}</ul>") if missing else "")
    page = files("morsr.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(filter(None, parts)))
    write_text(path, page)


def _section(title: str, body: str, lead: str = "") -> str:
    words = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{title}</h2>\n{words}\n{body}\n</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{f'<tr>{cells}</tr>' if any(head) else ''}{''.join(lines)}</table>"


def _picture(pixels: np.ndarray, caption: str = "") -> str:
    """A figure with an image (H, W, 3) uint8 as a PNG inside the page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="{source}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'


def _plot(figure: Figure) -> str:
    return f'<div class="plot">{_picture(pixels_of(figure))}</div>'


def _overview(table: RoutingTable) -> str:
    load, severity = table.loads(), table.severity
    dead = dead_experts(load, table.num_zero)
    most = table.num_shared + table.top_k * table.expert_rank
    mass, effective = table.gate_mass().mean(), table.effective_ranks().mean()
    rows = [
        ("images", str(len(table))),
        ("adapted layers", str(len(table.layer_names))),
        (
            "slots per layer",
            f"{table.num_real} experts of rank {table.expert_rank} and {table.num_zero} zero experts, of which "
            f"{table.top_k} are chosen; {table.num_shared} shared ranks",
        ),
        ("active ranks", f"{table.active_ranks().mean():.2f} of {most} per image and layer"),
        ("gate mass", f"{mass:.2f} of {table.top_k}, shared by {effective:.2f} effective experts"),
        ("routed update over shared update", f"{table.update.nanmean():.2f} (Frobenius norms)"),
        ("load entropy", f"{load_entropy(load).mean():.3f}, {load_entropy(load).min():.3f} in the worst layer"),
        ("dead experts", f"{int(dead.sum())} of {dead.numel()} (under a tenth of the even load)"),
        ("severity", f"{severity.min():.2f} to {severity.max():.2f}, mean {severity.mean():.2f}"),
    ]
    return _table(("", ""), rows)


def _kinds(table: RoutingTable, shown: Mapping[str, Tensor]) -> str:
    """A thumbnail for each kind of degradation."""
    if not shown:
        return ""
    names = {kind: table.names[row] for kind, row in table.typical().items()}
    captions = {kind: f"{kind}: {names[kind]}; {table.kinds().count(kind)} of {len(table)} images" for kind in shown}
    thumbnails = [_picture(to_uint8(centre(image[None], 96)), captions[kind]) for kind, image in shown.items()]
    lead = "LR images, the middle: for each kind the image that shows it most clearly. An image counts for one kind."
    return _section("What the kinds look like", f'<div class="thumbnails">{"".join(thumbnails)}</div>', lead)


def _load(table: RoutingTable) -> str:
    lead = (
        "Each row is a layer, its slots sorted by the kind that they answer to. Red: chosen more often than the even "
        "load, or, for a kind or a severity, than on the mean of the kinds or severities. Blue: less often."
    )
    figures = [table.plot("kind"), table.plot("severity")] if len(table) > 1 else [table.plot()]
    return _section("Load of every slot", "".join(map(_plot, figures)), lead)


def _specialised(table: RoutingTable, missing: list[str]) -> str:
    if not table.truth:
        missing.append(
            "The true degradations: kinds below are read from the estimator's scores, so a slot that looks specialised "
            "follows the estimator, which is all that the router sees."
        )
    try:
        found: Specialisation = table.specialisation()
    except InputError as error:
        missing.append(f"What each slot is for: {error}.")
        return ""
    rows = [
        (
            table.layer_names[layer],
            f"expert {slot}" if slot < table.num_real else f"zero {slot - table.num_real}",
            found.kinds[int(found.kind[layer, slot])],
            f"{found.information[layer, slot]:.3f}",
            f"{found.lift[layer, slot]:.2f}",
        )
        for layer, slot in found.top(12)
    ]
    counts = ", ".join(f"{kind} {len(found.top(found.kind.numel(), kind=kind))}" for kind in found.kinds)
    listed = _table(("layer", "slot", "kind", "bits", "times as often"), rows) if rows else ""
    lead = (
        "Mutual information between the choice of a slot and the kind of degradation, chance subtracted. A slot counts "
        "at a false discovery rate of 1 %."
    )
    more = "" if rows else " More images may show some."
    words = f"<p>Of {found.kind.numel()} slots, so many stand for a kind: {html.escape(counts)}.{more}</p>"
    return _section("What each slot is for", words + listed, lead)


def _zero(table: RoutingTable, missing: list[str]) -> str:
    if not table.num_zero:
        missing.append("Zero slots: this adapter has none.")
        return ""
    share, kinds = table.zero_share().mean(1), table.kinds()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    for kind in sorted(set(kinds)):
        mine = torch.tensor([other == kind for other in kinds])
        axis.scatter(table.severity[mine], share[mine], s=14, alpha=0.6, label=kind)
    axis.axhline(table.num_zero / table.num_slots, color="gray", linestyle="--", label="even load")
    axis.set(xlabel="severity", ylabel="share of zero slots", ylim=(0, None))
    axis.legend()
    correlation = spearman(table.severity, share)
    if math.isnan(correlation):
        missing.append("Zero share against severity: expected at least three images that differ in both.")
    lead = "" if math.isnan(correlation) else f"Spearman's rank correlation {correlation:+.2f}."
    return _section("Zero slots against severity", _plot(figure), lead)


def _example(example: Example, table: RoutingTable) -> str:
    routing, name = example.routing, example.routing.names[0]
    scores = dict(zip(routing.score_names, routing.scores[0].tolist(), strict=True))
    difference = example.shared - example.restored
    words = [
        f"Severity {routing.severity[0]:.2f} ({', '.join(f'{n} {v:.2f}' for n, v in scores.items())}).",
        f"Per layer {routing.active_ranks().mean():.1f} active ranks, gate mass {routing.gate_mass().mean():.2f}, "
        f"{routing.effective_ranks().mean():.2f} effective experts.",
        f"The routed ranks change it by {difference.square().mean().sqrt() * 255:.2f} of 255 (root mean square).",
        f"The routed update has {routing.update.nanmean():.2f} times the size of the shared one.",
    ]
    gain = 0.5 / max(difference.abs().max().item(), 1 / 255)
    images = {
        "input, bicubic": example.enlarged,
        "restored": example.restored,
        "by the shared ranks alone": example.shared,
        f"the difference, {gain:.0f} times": 0.5 + gain * difference,
    }
    pictures = "".join(_picture(to_uint8(image[None]), caption) for caption, image in images.items())
    groups = dict(zip(table.names, table.severity_groups(), strict=True))
    title = f"{groups.get(name, 'one').capitalize()} image: {html.escape(name)}"
    return _section(title, f'<div class="pictures">{pictures}</div>', html.escape(" ".join(words)))
