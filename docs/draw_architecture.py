"""Draws docs/architecture.svg and docs/data-flow.svg: ``python -m docs.draw_architecture``.

The first picture has a box per folder of kdx and an arrow per import between them, read from the source. An arrow that follows
from other arrows is left out. The second picture shows the way of the data, and names the folder that does each step.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
IMPORTS = Path(__file__).with_name("architecture.svg")
FLOW = Path(__file__).with_name("data-flow.svg")

BASE = "errors, roles, choices, ..."
"""The box of the single files at the bottom of kdx/, which every folder may import."""
WIDTH, HEIGHT, COLUMN, ROW = 124, 36, 156, 78

STEPS = (
    ("images and labels", "data"),
    ("each network, once", "runtimes"),
    ("features [n, C, H, W]", "features"),
    ("distances [n, n]", "kernels"),
    ("maps", "maps"),
    ("scores, intervals", "scores"),
    ("all layers, one set", "explain"),
    ("stored results", "runs"),
    ("the page", "report"),
)
FLOWS = ((0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (4, 6), (5, 6), (6, 7), (7, 8))
PLACES = ((0, 0.5), (1, 0.5), (2, 0.5), (3, 0.5), (3.6, 1.5), (2.2, 1.5), (2.9, 2.5), (1.7, 2.5), (0.5, 2.5))


def room(module: str) -> str:
    """The box of a module: its folder, ``losses``, or the box of the single files."""
    parts = module.split(".")
    if len(parts) > 1 and ((ROOT / "kdx" / parts[1]).is_dir() or parts[1] == "losses"):
        return parts[1]
    return BASE


def imports() -> dict[str, set[str]]:
    """The boxes that each box imports, from the source of kdx/, export/ and kernels/."""
    boxes: dict[str, set[str]] = {}
    for folder in ("kdx", "export", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "kdx" and relative in (Path("__init__.py"), Path("__main__.py")):
                continue  # the list of public names imports everything, and `python -m kdx` the command line
            if folder == "kdx" and relative.parts[0] in ("export", "kernels"):
                continue  # links to the folders beside kdx/
            mine = folder if folder != "kdx" else room(f"kdx.{relative.with_suffix('').as_posix().replace('/', '.')}")
            boxes.setdefault(mine, set())
            for module in _imported(path):
                other = room(module)
                boxes.setdefault(other, set())
                if other != mine:
                    boxes[mine].add(other)
    return boxes


def _imported(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kdx":
            yield from (f"kdx.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdx."):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("kdx."))


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that follow from others."""
    below: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set(graph[name]).union(*(reach(other) for other in graph[name]))
        return below[name]

    return {name: {other for other in others if not any(other in reach(between) for between in others)} for name, others in graph.items()}


Place = tuple[float, float]
Bend = tuple[str, str, int]
"""Where the arrow from one box to another passes a row."""


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Each box's row, counted from the top: a box stands just below the lowest of those that import it."""
    level: dict[str, int] = {}

    def place(name: str) -> int:
        if name not in level:
            level[name] = max((place(above) + 1 for above in graph if name in graph[above]), default=0)
        return level[name]

    return {name: place(name) for name in sorted(graph)}


def laid_out(graph: dict[str, set[str]]) -> dict[str | Bend, Place]:
    """The middle of each box and of each bend: rows from the top, each in the order of its neighbours above and below."""
    level = levels(graph)
    layers: list[list[str | Bend]] = [[] for _ in range(1 + max(level.values()))]
    neighbours: dict[str | Bend, list[str | Bend]] = {name: [] for name in level}
    for name, row in level.items():
        layers[row].append(name)
    for start in sorted(graph):
        for end in sorted(graph[start]):
            bends: list[str | Bend] = [(start, end, row) for row in range(level[start] + 1, level[end])]
            way = [start, *bends, end]
            for bend, row in zip(bends, range(level[start] + 1, level[end]), strict=True):
                layers[row].append(bend)
                neighbours[bend] = []
            for above, below in itertools.pairwise(way):
                neighbours[above].append(below)
                neighbours[below].append(above)
    across: dict[str | Bend, float] = {}
    for layer in layers:
        across |= _spread(layer)
    for layer in [*layers, *layers[::-1]] * 8:
        layer.sort(key=lambda item: sum(across[other] for other in neighbours[item]) / len(neighbours[item]))
        across |= _spread(layer)
    left = min(across[name] for name in level)
    return {item: (across[item] - left + COLUMN / 2 + 20, HEIGHT + row * ROW) for row, layer in enumerate(layers) for item in layer}


def _spread(layer: list[str | Bend]) -> dict[str | Bend, float]:
    """Places beside each other, around zero."""
    widths = [COLUMN if isinstance(item, str) else 44 for item in layer]
    return {item: sum(widths[:index]) + widths[index] / 2 - sum(widths) / 2 for index, item in enumerate(layer)}


def imports_svg() -> str:
    graph = reduced(imports())
    middle, level = laid_out(graph), levels(graph)
    arrows = []
    for start in sorted(graph):
        for end in sorted(graph[start]):
            bends = [middle[start, end, row] for row in range(level[start] + 1, level[end])]
            arrows.append(_arrow(middle[start], middle[end], bends=bends))
    boxes = [_box(*middle[name], name, width=190 if name == BASE else WIDTH) for name in sorted(graph)]
    title = "The folders of kdx. An arrow points from a folder to one that it imports."
    right, bottom = max(x for x, _ in middle.values()), max(y for _, y in middle.values())
    return svg(title, right + COLUMN / 2 + 20, bottom + HEIGHT, arrows + boxes)


def flow_svg() -> str:
    for _, folder in STEPS:
        assert (ROOT / "kdx" / folder).is_dir(), folder
    middle = [(100 + column * 190, 20 + row * 90) for column, row in PLACES]
    arrows = [_arrow(middle[start], middle[end], 160, 52) for start, end in FLOWS]
    boxes = [_box(*place, text, folder, 160, 52) for place, (text, folder) in zip(middle, STEPS, strict=True)]
    return svg("The data flow, with the folder that does each step.", 880, 290, arrows + boxes)


def _box(x: float, y: float, text: str, folder: str = "", width: int = WIDTH, height: int = HEIGHT) -> str:
    shape = f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="6"/>'
    if not folder:
        return f'{shape}<text x="{x:g}" y="{y + 5:g}">{escape(text)}</text>'
    return f'{shape}<text x="{x:g}" y="{y - 3:g}">{escape(text)}</text><text x="{x:g}" y="{y + 15:g}" class="folder">{folder}/</text>'


def _arrow(start: Place, end: Place, width: int = WIDTH, height: int = HEIGHT, bends: Iterable[Place] = ()) -> str:
    """A line between the sides of two boxes that face each other, through its bends."""
    (x, y), (u, v) = start, end
    if abs(v - y) < height:
        side = 1 if u > x else -1
        x, u = x + side * width / 2, u - side * (width / 2 + 3)
        return f'<path d="M{x:g} {y:g} L{u:g} {v:g}"/>'
    path, y = f"M{x:g} {y + height / 2:g}", y + height / 2
    for across, down in (*bends, (u, v - height / 2 - 3)):
        half = (down - y) / 2
        path += f" C{x:g} {y + half:g} {across:g} {down - half:g} {across:g} {down:g}"
        x, y = across, down
    return f'<path d="{path}"/>'


def svg(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>rect{fill:#f5f2fb;stroke:#5e35b1;stroke-width:1.2}"
        "text{font:14px sans-serif;text-anchor:middle;fill:#1c1530}.folder{font:12px monospace;fill:#5e35b1}"
        "path{fill:none;stroke:#8d86a0;stroke-width:1.2;marker-end:url(#head)}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#8d86a0"/></marker></defs>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    IMPORTS.write_text(imports_svg(), "utf-8")
    FLOW.write_text(flow_svg(), "utf-8")


if __name__ == "__main__":
    main()
