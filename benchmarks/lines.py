"""Line charts as SVG text, for the figures of the docs: no plotting library is asked for that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion2gan.runtime.files import write_image

COLOURS = ("#777777", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#b59f00", "#cc79a7", "#000000")
WIDTH, HEIGHT, LEFT, RIGHT = 420, 220, 48, 220
Series = Mapping[str, Sequence[tuple[float, float]]]


def panel(
    title: str, series: Series, low: float, high: float, logarithmic: bool = False
) -> list[str]:
    """SVG elements of one chart: a line per name through its (x, y); y from `low` to `high`, beyond is cut off."""

    def scale(y: float) -> float:
        return math.log10(y) if logarithmic else y

    def y_of(y: float) -> float:
        inside = min(max(y, low), high)
        return HEIGHT * (1 - (scale(inside) - scale(low)) / (scale(high) - scale(low)))

    last = max(x for points in series.values() for x, _ in points)
    count = round(scale(high) - scale(low)) if logarithmic else 4
    ticks = [scale(low) + (scale(high) - scale(low)) * i / count for i in range(count + 1)]
    made = [f'<text x="{LEFT}" y="-8" font-weight="bold">{title}</text>']
    for tick in ticks:
        value = 10**tick if logarithmic else tick
        y = y_of(value)
        made.append(
            f'<path d="M{LEFT} {y:.0f}h{WIDTH}" stroke="#ddd"/><text x="2" y="{y + 4:.0f}">{value:.3g}</text>'
        )
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(f"{LEFT + WIDTH * x / last:.1f},{y_of(y):.1f}" for x, y in points)
        made.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>'
        )
        made.append(
            f'<text x="{LEFT + WIDTH + 10}" y="{12 + 18 * i}" fill="{COLOURS[i]}">{name}</text>'
        )
    made.append(f'<text x="{LEFT + WIDTH}" y="{HEIGHT + 18}" text-anchor="end">{last:.6g}</text>')
    return made


def draw(path: Path, panels: Sequence[Sequence[str]], of: str) -> None:
    """Writes the panels below one another; `of` names the horizontal axis."""
    step, width = HEIGHT + 60, LEFT + WIDTH + RIGHT
    placed = [
        f'<g transform="translate(0 {30 + step * i})">{"".join(one)}</g>'
        for i, one in enumerate(panels)
    ]
    placed += [
        f'<text x="{LEFT}" y="{48 + step * i + HEIGHT}">0 {of}</text>' for i in range(len(panels))
    ]
    box = f'viewBox="0 0 {width} {step * len(panels)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    paper = f'<rect width="{width}" height="{step * len(panels)}" fill="white"/>'
    text = "\n".join([head, paper, *placed, "</svg>", ""])
    write_image(path, lambda temporary: temporary.write_text(text))
