"""Bits as pictures: one number in several formats, and one GGUF block, each cell a bit coloured by the field it serves.

Both functions return (plotly figure, pandas frame); the frame says the same in words, for `labkit.show(…, table=)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit import formats, gguf_blocks
from labkit.i18n import tr

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's palette, which colour-blind readers tell apart; the legend names each field as well.
COLOURS = {
    "sign": "#D55E00", "exponent": "#56B4E9", "mantissa": "#009E73", "integer": "#F0E442", "d": "#D55E00",
    "m": "#CC79A7", "dmin": "#CC79A7", "scale": "#56B4E9", "min": "#F0E442", "q": "#009E73", "q (next)": "#8FD3BF",
}  # fmt: skip


def number(value: float, names: list[str], scales: dict[str, float] | None = None) -> tuple[Any, pd.DataFrame]:
    """`value` in each named format, which holds value / scale rounded; `scales` gives the scales that are not 1."""
    import pandas as pd

    rows, table = [], []
    for name in names:
        scale = (scales or {}).get(name, 1.0)
        is_float = formats.format(name).is_float
        held = float(formats.rounded(np.array(value / scale), name)) if is_float else float(np.rint(value / scale))
        fields = formats.bit_fields(held, name)
        rows.append([(field, bit, f"{name}: {field}") for field, bits in fields for bit in bits])
        entry = {"format": name, **dict(fields), "scale": scale, "stored value": held * scale}
        table.append(entry | {"error": abs(held * scale - value)})
    figure = _grid(rows, names, tr("bit, most significant first"))
    return figure, pd.DataFrame(table).fillna("").set_index("format")


def block(data: bytes | np.ndarray, name: str, width: int = 16) -> tuple[Any, pd.DataFrame]:
    """One GGUF block as it lies in the file, `width` bits a line, bit 0 of byte 0 first."""
    import pandas as pd

    fields = gguf_blocks.describe_block(data, name)
    bits = np.unpackbits(np.frombuffer(bytes(data), np.uint8), bitorder="little")
    owner: dict[int, tuple[str, str]] = {}
    for field in fields:
        kind = field.name.split("[")[0]
        first, last = field.bits[0]
        shade = "q (next)" if kind == "q" and first // (last - first + 1) % 2 else kind  # neighbours in two shades
        for first, last in field.bits:
            owner |= {bit: (shade, f"{field.name} = {field.value:g}") for bit in range(first, last + 1)}
    cells = [(owner[i][0], str(bit), tr("bit {i}: {field}", i=i, field=owner[i][1])) for i, bit in enumerate(bits)]
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    labels = [tr("byte {at}", at=i * width // 8) for i in range(len(rows))]
    where = [", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in f.bits) for f in fields]
    table = pd.DataFrame({"bits": where, "value": [f.value for f in fields]}, index=[f.name for f in fields])
    return _grid(rows, labels, tr("bit within the line, least significant first")), table.rename_axis("field")


def _grid(rows: list[list[tuple[str, str, str]]], labels: list[str], x_title: str) -> Any:
    """Cells (field, text, hover) in lines; a legend entry for every field that occurs."""
    import plotly.graph_objects as go

    kinds = list(dict.fromkeys(field for row in rows for field, _, _ in row))
    wide = max(map(len, rows))
    z = [[kinds.index(f) for f, _, _ in row] + [None] * (wide - len(row)) for row in rows]
    text = [[bit for _, bit, _ in row] + [""] * (wide - len(row)) for row in rows]
    hover = [[said for _, _, said in row] + [""] * (wide - len(row)) for row in rows]
    steps = [(edge, COLOURS[k]) for i, k in enumerate(kinds) for edge in (i / len(kinds), (i + 1) / len(kinds))]
    figure = go.Figure(go.Heatmap(
        z=z, y=labels, text=text, texttemplate="%{text}", customdata=hover,
        hovertemplate="%{customdata}<extra></extra>", xgap=1, ygap=2,
        colorscale=steps, zmin=-0.5, zmax=len(kinds) - 0.5, showscale=False,
    ))  # fmt: skip
    for kind in kinds:
        marker = {"color": COLOURS[kind], "symbol": "square", "size": 12}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=kind, marker=marker)
    figure.update_layout(height=90 + 26 * len(rows), margin={"t": 30, "b": 40, "l": 80, "r": 10}, plot_bgcolor="white")
    figure.update_xaxes(title=x_title, showgrid=False, dtick=4)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure
