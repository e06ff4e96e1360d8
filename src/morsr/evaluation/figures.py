"""What the figures of the routing report share: labels, axes and style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from morsr.evaluation.routing import RoutingTable
from morsr.functional.layer_names import block_of


def slot_names(table: RoutingTable) -> list[str]:
    """The experts, then the zero experts."""
    return [f"expert {slot}" for slot in range(table.num_real)] + [f"zero {slot}" for slot in range(table.num_zero)]


def layer_labels(table: RoutingTable, order: Sequence[int]) -> list[str]:
    """Names of the layers in an order."""
    return [table.layer_names[index] for index in order]


def layers_axis(figure: Any, table: RoutingTable, order: Sequence[int], top: int) -> None:
    """First layer on top; one tick per network block, at its first layer, since there is no room for every name."""
    names = layer_labels(table, order)
    blocks = [block_of(name) for name in names]
    starts = [row for row in range(len(names)) if row == 0 or blocks[row] != blocks[row - 1]]
    room = [row for row, end in zip(starts, [*starts[1:], len(names)], strict=True) if end - row >= len(names) / 40]
    figure.update_yaxes(
        autorange="reversed", tickvals=[names[row] for row in room], ticktext=[f"{blocks[row]} " for row in room]
    )
    figure.update_xaxes(showticklabels=False, title="slots")
    figure.update_layout(height=max(360, min(900, 14 * len(names))), margin={"t": top})


def rounded(values: Tensor, digits: int) -> list[Any]:
    """Numbers for a page, which every digit makes longer."""
    return values.double().round(decimals=digits).tolist()


def figure_html(figure: Any) -> str:
    """A plotly figure in the page's style; plotly itself stands in the page's head."""
    figure.update_layout(template="plotly_white", font={"family": "system-ui, sans-serif", "size": 13})
    if figure.layout.margin.t is None:
        figure.update_layout(margin={"t": 20})
    figure.update_layout(margin={"l": 70, "r": 20, "b": 50})
    figure.update_yaxes(automargin=True)
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
