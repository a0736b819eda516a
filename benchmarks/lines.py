"""Line charts as SVG text, for the figures of the documents, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion2gan.runtime.files import write_image

COLOURS = ("#777777", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#b59f00", "#cc79a7", "#000000")

# Size of a panel's axes in pixels; space to the left (tick labels) and to the right (legend)
WIDTH = 420
HEIGHT = 220
LEFT = 48
RIGHT = 220
PANEL_HEIGHT = HEIGHT + 60

Series = Mapping[str, Sequence[tuple[float, float]]]


def panel(
    title: str, series: Series, low: float, high: float, logarithmic: bool = False
) -> list[str]:
    """SVG elements of one chart: a line through the (x, y) of each name.

    The vertical axis goes from `low` to `high`; values beyond are drawn at its ends.
    """

    def scale(y: float) -> float:
        return math.log10(y) if logarithmic else y

    def y_pixels(y: float) -> float:
        clipped = min(max(y, low), high)
        return HEIGHT * (1 - (scale(clipped) - scale(low)) / (scale(high) - scale(low)))

    elements = [f'<text x="{LEFT}" y="-8" font-weight="bold">{title}</text>']

    # Horizontal grid lines and their labels: one per decade, or five
    num_intervals = round(scale(high) - scale(low)) if logarithmic else 4
    for i in range(num_intervals + 1):
        tick = scale(low) + (scale(high) - scale(low)) * i / num_intervals
        value = 10**tick if logarithmic else tick
        y = y_pixels(value)
        elements.append(
            f'<path d="M{LEFT} {y:.0f}h{WIDTH}" stroke="#ddd"/>'
            f'<text x="2" y="{y + 4:.0f}">{value:.3g}</text>'
        )

    # Lines and legend
    last = max(x for points in series.values() for x, _ in points)
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(f"{LEFT + WIDTH * x / last:.1f},{y_pixels(y):.1f}" for x, y in points)
        colour = COLOURS[i]
        elements.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        elements.append(
            f'<text x="{LEFT + WIDTH + 10}" y="{12 + 18 * i}" fill="{colour}">{name}</text>'
        )

    elements.append(
        f'<text x="{LEFT + WIDTH}" y="{HEIGHT + 18}" text-anchor="end">{last:.6g}</text>'
    )
    return elements


def draw(path: Path, panels: Sequence[Sequence[str]], x_label: str) -> None:
    """Writes the panels below one another; `x_label` names the horizontal axis."""
    width = LEFT + WIDTH + RIGHT
    height = PANEL_HEIGHT * len(panels)

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, elements in enumerate(panels):
        svg.append(f'<g transform="translate(0 {30 + PANEL_HEIGHT * i})">{"".join(elements)}</g>')
    for i in range(len(panels)):
        y = 48 + PANEL_HEIGHT * i + HEIGHT
        svg.append(f'<text x="{LEFT}" y="{y}">0 {x_label}</text>')
    svg.append("</svg>")

    text = "\n".join(svg) + "\n"
    write_image(path, lambda temporary: temporary.write_text(text))
