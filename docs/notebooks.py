"""Runs the notebooks and stores what they print and draw: ``python -m docs.notebooks``.

A notebook's cells run in one namespace, in order, as Jupyter runs them. The site shows the stored notebooks.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells: printed text, the value of a last expression, and figures as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    with mock.patch.object(pyplot, "show"):  # figures stay open until the cell is done
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell = cell | {"execution_count": count, "outputs": _run("".join(cell["source"]), namespace)}
            cells.append(cell)
    return notebook | {"cells": cells}


def _run(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    from matplotlib import pyplot

    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None and not pyplot.get_fignums():
        outputs.append(_display({"text/plain": repr(value).splitlines(keepends=True)}))
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=80, bbox_inches="tight")
        outputs.append(_display({"image/png": base64.b64encode(picture.getvalue()).decode()}))
    pyplot.close("all")
    return outputs


def _display(data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def as_markdown(path: Path) -> str:
    """A stored notebook as a page of the site."""
    parts = []
    for cell in read(path)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                parts.append(f"![What the cell above draws](data:image/png;base64,{output['data']['image/png']})")
            else:
                parts.append(f"```text\n{''.join(output['data']['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n"


def as_text(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    for path in PATHS:
        path.write_text(as_text(execute(read(path))), "utf-8")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
