"""Draws the pictures of docs/concepts.md: ``python -m docs.draw_concepts``, half a minute on two cores.

roles.svg has the three networks and their four maps. maps.png has maps of a student of handwritten digits, trained here.
estimators.png has the scores of unrelated features at several numbers of images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import kdx
from docs.draw_architecture import svg
from kdx.data.dataset import open_data
from kdx.data.splits import stratified_splits
from kdx.distill import TrainingSettings, distill
from kdx.maps.overlays import composite, scaled_for_display
from kdx.models import read_models
from kdx.roles import MAPS, ROLES, pairs_among
from kdx.scores.score import Estimator

FOLDER = Path(__file__).parent

KINDS = {name: MAPS[name] for name in pairs_among(ROLES)}


def roles_svg() -> str:
    """The networks as boxes, and a pair of arrows per comparison, named after its maps."""
    places = {"teacher": (380, 40), "student": (160, 190), "base": (600, 190)}
    captions = {"teacher": "the larger network", "student": "trained under the teacher", "base": "trained without the teacher"}
    parts = []
    for role, (x, y) in places.items():
        parts.append(f'<rect x="{x - 110}" y="{y - 28}" width="220" height="56" rx="6"/>')
        parts.append(f'<text x="{x}" y="{y - 4}">{role}</text><text x="{x}" y="{y + 15}" class="folder">{captions[role]}</text>')
    symbols = {name: f"{name}: {kind.symbol}" for name, kind in KINDS.items()}
    parts += [
        '<path d="M275 182 L485 182"/>',
        '<path d="M485 200 L275 200"/>',
        f'<text x="380" y="174">{symbols["distilled"]}</text><text x="380" y="221">{symbols["residual"]}</text>',
        '<path d="M180 158 L290 72"/>',
        '<path d="M306 72 L196 158"/>',
        f'<text x="170" y="112">{symbols["new"]}</text><text x="322" y="136">{symbols["missed"]}</text>',
    ]
    return svg("Three networks and four maps. An arrow leads from the explained network to the given one.", 760, 250, parts)


def draw_maps(path: Path) -> None:
    from matplotlib import pyplot

    settings = TrainingSettings(method="kd", epochs=60, teacher_epochs=4, batch=32, augment=True, student_images=80, image_size=(24, 24))
    with tempfile.TemporaryDirectory() as folder:
        large, small = "kdx:resnet,width=16,depth=1", "kdx:resnet,width=8,depth=1"
        models = read_models(distill("digits", teacher=large, student=small, out=folder, settings=settings))
        data = open_data("digits")
        chosen = stratified_splits(data, seed=settings.seed)["test"][:128]
        images = np.stack([np.asarray(data.read(index), dtype=np.float32).transpose(2, 0, 1) / 255 for index in chosen])
        teacher, student, base = (models.load(role) for role in ("teacher", "student", "base"))
        with kdx.Explainer(teacher=teacher, student=student, base=base, layers=["layer2"], runtime="eager") as explainer:
            result = explainer(images, data.labels[chosen]).layers["layer2"]
    shown = np.flatnonzero(result.distilled.maps.max((1, 2)) > 0)[:8]
    figure, axes = pyplot.subplots(1 + len(KINDS), len(shown), figsize=(8, 5.2))
    for column, index in enumerate(shown):
        pixels = np.rint(images[index].transpose(1, 2, 0) * 255).astype(np.uint8).repeat(12, 0).repeat(12, 1)
        pictures = [pixels, *(composite(pixels, scaled_for_display(getattr(result, name).maps)[index]) for name in KINDS)]
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[:, 0], ("image", *(f"{name} ({kind.symbol})" for name, kind in MAPS.items())), strict=True):
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def draw_estimators(path: Path) -> None:
    from matplotlib import pyplot

    generator = np.random.default_rng(0)
    counts = (4, 6, 10, 16, 32, 64, 128)
    figure, axis = pyplot.subplots(figsize=(6, 3))
    colours: dict[Estimator, str] = {"biased": "#e8830c", "unbiased": "#5e35b1"}
    for estimator, colour in colours.items():
        pairs = [[generator.normal(size=(2, n, 256)) for _ in range(60)] for n in counts]
        scores = [[kdx.fss(a, b, estimator, permutations=0).value for a, b in row] for row in pairs]
        low, middle, high = np.percentile(scores, (5, 50, 95), axis=1)
        axis.plot(counts, middle, "o-", color=colour, label=estimator)
        axis.fill_between(counts, low, high, color=colour, alpha=0.2)
    axis.set(xscale="log", xlabel="images", ylabel="FSS of unrelated features", ylim=(-1.05, 1.05))
    axis.set_xticks(counts, map(str, counts))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    (FOLDER / "roles.svg").write_text(roles_svg(), "utf-8")
    draw_estimators(FOLDER / "estimators.png")
    draw_maps(FOLDER / "maps.png")


if __name__ == "__main__":
    main()
