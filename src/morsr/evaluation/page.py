"""The frame of the report: one HTML page with its style, tables and pictures inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; margin-bottom: .5rem; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .3rem; border-top: 1px solid #dadce0; padding-top: 1.2rem; }}
p.lead {{ color: #5f6368; margin-top: 0; max-width: 85ch; }}
table {{ border-collapse: collapse; margin: .6rem 0; }}
td, th {{ text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #eceff1; }}
.pictures {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; image-rendering: auto; border: 1px solid #dadce0; }}
figcaption {{ color: #5f6368; font-size: .9rem; overflow-wrap: anywhere; }}
footer {{ color: #5f6368; margin-top: 3rem; font-size: .85rem; }}
</style>
<script>{plotly}</script>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>Made by morsr; plots by plotly {version}, inside this file.</footer>
</body>
</html>
"""


def section(title: str, body: str, lead: str = "") -> str:
    """One part of the page; title, lead and body are HTML."""
    words = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section>\n<h2>{title}</h2>\n{words}\n{body}\n</section>"


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of texts, escaped; without a head where its cells are empty."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{f'<tr>{cells}</tr>' if any(head) else ''}{''.join(lines)}</table>"


def data_image(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as a data address with a PNG inside."""
    from PIL import Image

    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
