"""Draws docs/planted.png, the picture of docs/evidence.md: ``python -m docs.draw_planted``, half a minute on one core.

The images have a planted colour. Each has its maps of five kinds, from one pair of networks of `benchmarks.planted`: on the left the cue
names the class, on the right it is drawn independently of the class.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.planted import TEST_IMAGES, geometry_maps, layer_features, network_maps, train
from kdx.data.planted_cues import SIDE, draw_composites

PICTURE = Path(__file__).with_name("planted.png")
LAYER = "layer2"
SHOWN = {
    "UniCAM S|B, relevance, gap": "UniCAM S|B",
    "UniCAM S|B − UniCAM B|S": "UniCAM S|B − UniCAM B|S",
    "decomposition of RS(S) − RS(B)": "RS(S) − RS(B)",
    "Grad-CAM of S − Grad-CAM of B": "Grad-CAM S − B",
    "activations of S − activations of B": "activations S − B",
}
"""The maps, and their titles in the picture."""
COUNT = 4


def draw(path: Path) -> None:
    from matplotlib import pyplot

    networks = train("colour", True, 0, 0), train("colour", False, 0, 1)
    figure, axes = pyplot.subplots(1 + len(SHOWN), 2 * COUNT, figsize=(8.2, 6.2))
    for side, informative in enumerate((True, False)):
        images = draw_composites("colour", TEST_IMAGES, 2, informative=informative)
        s, b = (layer_features(network, images)[LAYER] for network in networks)
        maps = {**geometry_maps(s, b, images.labels), **network_maps(*networks, s, b, LAYER, images)}
        for index in range(COUNT):
            column = axes[:, COUNT * side + index]
            column[0].imshow(images.images[index].transpose(1, 2, 0))
            for axis, name in zip(column[1:], SHOWN, strict=True):
                limit = np.abs(maps[name][index]).max()
                axis.imshow(maps[name][index], cmap="PuOr_r", vmin=-limit, vmax=limit, extent=(0, SIDE, SIDE, 0))
                axis.contour(images.planted[index], [0.5], colors="black", linewidths=0.8, extent=(0, SIDE, 0, SIDE))
            for axis in column:
                axis.set(xticks=[], yticks=[])
        axes[0, COUNT * side].set_title(("cue names the class", "cue is irrelevant")[side], loc="left", fontsize=9)
    for axis, title in zip(axes[:, 0], ("image", *SHOWN.values()), strict=True):
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    draw(PICTURE)


if __name__ == "__main__":
    main()
