"""Draws docs/composites.png, the picture of the data set composites in docs/data.md: ``python -m docs.draw_composites``, a few seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdx.data.dataset import open_data

PICTURE = Path(__file__).with_name("composites.png")
SIDE = 112
ROWS = {
    "classes=texture": ("train", False),
    "classes=shape": ("train", False),
    "classes=texture,spurious=1": ("train", False),
    "classes=shape,scale=0.3,clutter=5": ("train", True),
}
"""The options of each row, and the split; the last row shows the masks as outlines."""


def draw(path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(ROWS), 6, figsize=(8, 5.9))
    for row, (options, (split, outlined)) in enumerate(ROWS.items()):
        data = open_data(f"composites:side={SIDE},{options}")
        for column in range(6):
            index, axis = int(data.splits[split][column + 6 * row]), axes[row, column]
            axis.imshow(np.asarray(data.read(index)))
            if outlined and data.masks is not None and (masks := data.masks(index)) is not None:
                axis.contour(masks[0], [0.5], colors="white", linewidths=1.2)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(data.classes[data.labels[index]], fontsize=8)
        axes[row, 0].set_title(options.replace(",", ", "), loc="left", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    draw(PICTURE)


if __name__ == "__main__":
    main()
