"""The routing of many images as one HTML page that needs no network."""

from __future__ import annotations

import html
import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from morsr.errors import InputError, MissingDependencyError
from morsr.evaluation.example import Example
from morsr.evaluation.figures import figure_html, layer_labels, layers_axis, rounded, slot_names
from morsr.evaluation.page import PAGE, data_image, section, table_html
from morsr.evaluation.routing import RoutingTable
from morsr.evaluation.specialisation import Specialisation
from morsr.files import write_text
from morsr.functional.layer_names import flow_order
from morsr.functional.routing import slot_load
from morsr.functional.utilization import (
    collapsed_layers,
    dead_experts,
    load_entropy,
    load_spread,
    spearman,
)

GREEN, RED, GRAY = "#21918c", "#c0392b", "#9aa0a6"


def write_report(
    table: RoutingTable,
    path: str | Path,
    *,
    examples: Sequence[Example] = (),
    title: str = "Which ranks run for which image",
    notes: Sequence[str] = (),
) -> Path:
    """Write the report; the file appears whole or not at all.

    Args:
        table: routing of at least one image.
        path: the HTML file.
        examples: single images in depth, from `examine`.
        title: heading.
        notes: further lines for the list of what the page cannot show.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError("the report needs plotly: pip install 'morsr[report]'") from error
    missing = list(notes)
    parts = [_overview(table)]
    if table.is_routed:
        specialisation = _specialisation(table, missing)
        parts += [
            _collapse(table),
            _load(table),
            _specialised(table, specialisation),
            _zero(table, missing),
            _ranks(table),
        ]
    else:
        missing.append(
            "Everything about ranks: this model has no routing, its ranks all run for every image. What its estimator "
            "says of the images is below."
        )
    parts += [_scores(table), *(_example(example, table) for example in examples)]
    if not examples:
        missing.append("Restored pictures with ranks switched off: no image was restored for this page.")
    if missing:
        rows = "".join(f"<li>{html.escape(note)}</li>" for note in missing)
        parts.insert(1, section("What this page cannot show", f"<ul>{rows}</ul>"))
    text = PAGE.format(
        title=html.escape(title),
        plotly=get_plotlyjs(),
        body="\n".join(part for part in parts if part),
        version=importlib.metadata.version("plotly"),
    )
    path = Path(path)
    write_text(path, text)
    return path


def _specialisation(table: RoutingTable, missing: list[str]) -> Specialisation | None:
    if not table.kinds_are_known:
        missing.append(
            "The true degradations are not known: kinds below are told from the estimator's scores, so a slot that "
            "looks specialised follows the estimator, which is all that the router sees."
        )
    try:
        return table.specialisation()
    except InputError as error:
        missing.append(f"What each slot is for: {error}.")
        return None


def _overview(table: RoutingTable) -> str:
    severity = f"{table.severity.min():.2f} to {table.severity.max():.2f}, mean {table.severity.mean():.2f}"
    if not table.is_routed:
        return table_html(("", ""), [("images", str(len(table))), ("severity", severity)])
    load = table.loads()
    dead = dead_experts(load, table.num_zero)
    ranks = table.active_ranks()
    most = table.num_shared + table.top_k * table.expert_rank
    return table_html(
        ("", ""),
        [
            ("images", str(len(table))),
            ("adapted layers", str(len(table.layer_names))),
            (
                "slots per layer",
                f"{table.num_real} experts of rank {table.expert_rank} and {table.num_zero} zero experts; "
                f"{table.top_k} are chosen, beside {table.num_shared} shared ranks",
            ),
            ("ranks that run", f"{ranks.mean():.2f} of {most} per image and layer"),
            (
                "load entropy",
                f"{load_entropy(load).mean():.3f} on average, {load_entropy(load).min():.3f} in the worst layer",
            ),
            ("dead experts", f"{int(dead.sum())} of {dead.numel()} (under a tenth of the even load)"),
            ("severity", severity),
        ],
    )


def _collapse(table: RoutingTable) -> str:
    """A warning that names the layers whose router has collapsed, or nothing."""
    counts = slot_load(table.chosen.transpose(0, 1), table.num_slots)
    collapsed = collapsed_layers(counts, table.top_k, table.num_zero)
    if not collapsed:
        return ""
    load = table.loads()
    spread = load_spread(load, table.top_k)
    dead = dead_experts(load, table.num_zero).double().mean(1)
    rows = [(table.layer_names[row], f"{dead[row]:.0%}", f"{spread[row]:.2f}") for row in collapsed[:20]]
    lead = (
        f"In {len(collapsed)} of {len(load)} layers more than half of the experts are dead, or nearly all images take "
        "the same slots. The router tells no images apart there; a larger balance weight, more or longer router noise "
        "or a lower router learning rate helps."
    )
    return section("Warning: experts have collapsed", table_html(("layer", "dead experts", "load spread"), rows), lead)


def _scores(table: RoutingTable) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values in [("severity", table.severity), *zip(table.score_names, table.scores.unbind(1), strict=True)]:
        figure.add_box(
            y=rounded(values, 4), name=name, boxpoints="all" if len(table) <= 400 else "outliers", jitter=0.4,
            pointpos=0, marker={"size": 3, "opacity": 0.5}, line={"color": GREEN}, text=list(table.names),
            hovertemplate="%{text}<br>%{y}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(yaxis={"range": [0, 1], "title": "score"}, height=340, showlegend=False)
    return section(
        "Degradation scores of the images",
        figure_html(figure),
        "What the estimator says of every image, 1 is worst. The router sees the scores and nothing else: where they "
        "hardly vary, it has nothing to tell images apart by.",
    )


def _load(table: RoutingTable) -> str:
    import plotly.graph_objects as go

    groups = [("all images", table.heatmap()[1][0])]
    if len(table) > 1:
        groups += [(f"kind: {name}", load) for name, load in zip(*table.heatmap("kind"), strict=True)]
        groups += [(f"severity: {name}", load) for name, load in zip(*table.heatmap("severity"), strict=True)]
    order = flow_order(table.layer_names)
    values = [rounded(load[order] * table.num_slots, 2) for _, load in groups]
    figure = go.Figure(
        go.Heatmap(
            z=values[0], x=slot_names(table), y=layer_labels(table, order), zmin=0, zmax=3, colorscale="Viridis",
            colorbar={"title": "load over<br>even load"},
            hovertemplate="%{y}<br>%{x}: %{z} times the even load<extra></extra>",
        )
    )  # fmt: skip
    buttons = [
        {"label": name, "method": "restyle", "args": [{"z": [value]}]}
        for (name, _), value in zip(groups, values, strict=True)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 6}}
    layers_axis(figure, table, order, 60)
    figure.update_layout(updatemenus=[menu])
    if table.num_zero:
        figure.add_vline(x=table.num_real - 0.5, line={"color": "white", "width": 2})
    return section(
        "Load of every slot",
        figure_html(figure),
        "Each row is a layer, each column a slot of its gate; zero experts stand to the right of the white line. 1 is "
        "the even load. Choose a kind of degradation or a severity above the picture. Slots of the same number in "
        "different layers have nothing to do with each other.",
    )


def _specialised(table: RoutingTable, found: Specialisation | None) -> str:
    if found is None:
        return ""
    import plotly.graph_objects as go

    order = flow_order(table.layer_names)
    hover = [
        [f"{found.kinds[kind]}, {lift:.1f} times as often" for kind, lift in zip(kinds, lifts, strict=True)]
        for kinds, lifts in zip(found.kind[order].tolist(), found.lift[order].tolist(), strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=rounded(found.information[order].clamp_min(0), 3), x=slot_names(table), y=layer_labels(table, order),
            text=hover, colorscale="Magma", zmin=0, colorbar={"title": "bits"},
            hovertemplate="%{y}<br>%{x}: %{z} bits<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    layers_axis(figure, table, order, 20)
    top = found.top(12)
    rows = [
        (
            table.layer_names[layer],
            slot_names(table)[slot],
            found.kinds[int(found.kind[layer, slot])],
            f"{found.information[layer, slot]:.3f}",
            f"{found.lift[layer, slot]:.2f}",
        )
        for layer, slot in top
    ]
    counts = [f"{kind}: {len(found.top(found.kind.numel(), kind=kind))}" for kind in found.kinds]
    if rows:
        listed = table_html(("layer", "slot", "kind", "bits", "times as often"), rows)
        words = f"<p>Slots that stand for a kind beyond chance: {html.escape(', '.join(counts))}.</p>"
    else:
        listed, words = "", "<p>No slot stands for a kind of degradation beyond chance in these images.</p>"
    return section(
        "What each slot is for",
        words + figure_html(figure) + listed,
        "Mutual information between the choice of a slot and the kind of degradation, chance subtracted: 0 bits, the "
        "slot does not care. Beyond chance means p &lt; 0.01 after correction for the number of slots.",
    )


def _zero(table: RoutingTable, missing: list[str]) -> str:
    if not table.num_zero:
        missing.append("Zero slots: this adapter has none.")
        return ""
    import plotly.graph_objects as go

    share = table.zero_share().mean(1)
    kinds = table.kinds()
    figure = go.Figure()
    for kind in sorted(set(kinds)):
        mine = torch.tensor([other == kind for other in kinds])
        names = [name for name, keep in zip(table.names, mine.tolist(), strict=True) if keep]
        figure.add_scatter(
            x=rounded(table.severity[mine], 4), y=rounded(share[mine], 4), text=names, mode="markers", name=kind,
            marker={"size": 7, "opacity": 0.6},
            hovertemplate="%{text}<br>severity %{x}, zero share %{y}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=table.num_zero / table.num_slots,
        line={"color": GRAY, "dash": "dash"},
        annotation_text="even load",
        annotation_position="bottom left",
    )
    figure.update_layout(
        xaxis_title="severity", yaxis_title="share of zero slots", height=380, yaxis_rangemode="tozero"
    )
    correlation = spearman(table.severity, share)
    if math.isnan(correlation):
        words = "A rank correlation needs at least three images that differ in severity and in zero share."
        missing.append(f"Zero share against severity: {words[0].lower()}{words[1:]}")
    else:
        words = f"Rank correlation (Spearman) {correlation:+.2f}: " + (
            "severe images use fewer zero slots, as the balance loss wants it."
            if correlation < -0.1
            else "severe images do not use fewer zero slots."
        )
    return section("Zero slots against severity", figure_html(figure), words)


def _ranks(table: RoutingTable) -> str:
    import plotly.graph_objects as go

    order = flow_order(table.layer_names)
    ranks = table.active_ranks()[:, order]
    groups = table.severity_groups()
    figure = go.Figure()
    for name, colour in (("light", "#5ec962"), ("medium", GREEN), ("severe", "#440154")):
        mine = torch.tensor([group == name for group in groups])
        if mine.any():
            figure.add_scatter(
                x=layer_labels(table, order), y=rounded(ranks[mine].mean(0), 3), name=f"{name} ({int(mine.sum())})",
                line={"color": colour}, hovertemplate="%{x}<br>%{y} ranks<extra></extra>",
            )  # fmt: skip
    most = table.num_shared + table.top_k * table.expert_rank
    figure.add_hline(
        y=most,
        line={"color": GRAY, "dash": "dash"},
        annotation_text="no zero slot chosen",
        annotation_position="bottom left",
    )
    figure.update_layout(yaxis_title="ranks per image", height=380)
    figure.update_xaxes(showticklabels=False, title="layers from input to output (names on hover)")
    return section(
        "Active ranks along the network",
        figure_html(figure),
        f"Shared ranks ({table.num_shared}) and the chosen real experts, on average over the images of each third of "
        "severity.",
    )


def _example(example: Example, table: RoutingTable) -> str:
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=list(example.scores), y=[round(value, 4) for value in example.scores.values()]))
    figure.update_traces(marker_color=GREEN, hovertemplate="%{x}: %{y}<extra></extra>")
    figure.update_layout(yaxis={"range": [0, 1], "title": "score"}, height=260)
    spared = example.saved_flops / max(example.adapter_flops + example.saved_flops, 1)
    facts = (
        f"Severity {example.severity:.2f}. {example.ranks.mean():.1f} ranks run per layer. The networks take "
        f"{_flops(example.network_flops)}, its ranks {_flops(example.adapter_flops)} more; zero slots spared "
        f"{_flops(example.saved_flops)}, {spared:.1%} of what the ranks would cost (the ranks can also be merged into "
        "the weights for one image, and then cost nothing)."
    )
    pictures = [
        _picture(example.enlarged, "input, bicubic"),
        _picture(example.restored, "restored, all its ranks"),
    ]
    for changed in example.without:
        gain = 1 / max((changed.image - example.restored).abs().max().item(), 1 / 255)
        difference = (0.5 + 0.5 * gain * (changed.image - example.restored)).clamp(0, 1)
        pictures.append(_picture(changed.image, f"without {changed.name} ({changed.count} off)"))
        pictures.append(
            _picture(difference, f"what changed, {gain:.0f} times; {changed.difference:.2f} of 255 on average (rms)")
        )
    return section(
        f"One image: {html.escape(example.name)}",
        figure_html(figure) + f'<div class="pictures">{"".join(pictures)}</div>',
        facts,
    )


def _picture(image: torch.Tensor, caption: str) -> str:
    return f'<figure><img src="{data_image(image)}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'


def _flops(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    raise AssertionError
