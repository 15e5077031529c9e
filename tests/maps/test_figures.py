"""Figures of maps: the pixels, the numbers at the colour bars, and the texts that a reader sees."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from numpy.typing import NDArray
from PIL import Image

import kdx
from kdx.maps import overlays
from kdx.maps.decomposition import Decomposition
from kdx.maps.drawing import FigureOptions
from kdx.maps.unicam import Maps
from tests.colour_vision import DEFICIENCIES, seen

RNG = np.random.default_rng(0)
UNICAM = Maps(RNG.random((3, 4, 5)), RNG.normal(size=(3, 6)), 0.5)
SIGNED = Decomposition(RNG.normal(size=(3, 2, 2)), RNG.normal(size=(3, 2, 2)), None, 0.1)


def rendered(result: Any, path: Path, images: Any = None, **options: Any) -> tuple[NDArray[np.uint8], Any]:
    """The pixels of a saved PNG, and the same figure as an object, which knows where its axes are."""
    result.save(path, images, **options)
    return np.asarray(Image.open(path).convert("RGB")), result.figure(images, **options)


def at(pixels: NDArray[np.uint8], axes: Any, row: float, column: float) -> NDArray[np.int64]:
    """The pixel at a place of some axes, as shares of their height and width from their upper left corner."""
    box = axes.get_position()
    y, x = 1 - box.y1 + row * box.height, box.x0 + column * box.width
    return np.asarray(pixels[int(y * pixels.shape[0]), int(x * pixels.shape[1])], dtype=np.int64)


def ticks(axes: Any) -> list[str]:
    return [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axes.get_xticklabels()]


@pytest.mark.parametrize("scale", ["common", "own"])
def test_cells_have_the_colours_of_their_values(tmp_path: Path, scale: Any) -> None:
    pixels, figure = rendered(UNICAM, tmp_path / "figure.png", cells="raw", scale=scale)
    *panels, bar = figure.axes
    assert len(panels) == 3
    for map_, axes in zip(UNICAM.maps, panels, strict=True):
        highest = UNICAM.maps.max() if scale == "common" else map_.max()
        for i in range(4):
            for j in range(5):
                expected = overlays.colours()[round(255 * float(map_[i, j] / highest))].astype(int)
                assert np.abs(at(pixels, axes, (i + 0.5) / 4, (j + 0.5) / 5) - expected).max() <= 2
    assert ticks(bar) == (["0", f"{UNICAM.maps.max():.2g}"] if scale == "common" else ["0", "1"])
    assert np.abs(at(pixels, bar, 0.5, 0.98) - overlays.colours()[250].astype(int)).max() <= 12


def test_signed_maps_are_white_at_zero_and_have_a_symmetric_scale(tmp_path: Path) -> None:
    pixels, figure = rendered(SIGNED, tmp_path / "figure.png", cells="raw")
    *panels, bar = figure.axes
    highest = np.abs(SIGNED.maps).max()
    for map_, axes in zip(SIGNED.maps, panels, strict=True):
        for i in range(2):
            for j in range(2):
                t = map_[i, j] / highest
                colour = overlays.diverging_colours()[round(127.5 * (t + 1))]
                expected = (1 - abs(t)) * 255 + abs(t) * colour
                assert np.abs(at(pixels, axes, (i + 0.5) / 2, (j + 0.5) / 2) - expected).max() <= 3
    assert ticks(bar) == [f"{-highest:.2g}", "0", f"{highest:.2g}"]
    assert (at(pixels, bar, 0.5, 0.5) > 248).all()


def test_maps_over_images_are_composites(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 240, 300, 3)).astype(np.uint8)
    pixels, figure = rendered(UNICAM, tmp_path / "figure.png", images, edge=1.5, dpi=200)
    for place, axes in enumerate(figure.axes[:3]):
        drawn = axes.get_images()[0].get_array()
        assert np.array_equal(drawn, overlays.composite(images[place], UNICAM.maps[place] / UNICAM.maps.max()))
        assert axes.get_position().width * pixels.shape[1] == pytest.approx(300, abs=1)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for same in (tensors, [Image.fromarray(image) for image in images]):
        assert UNICAM.save(tmp_path / "same.png", same).read_bytes() == (tmp_path / "figure.png").read_bytes()


def layer_result() -> kdx.LayerResult[Any]:
    new, missed = (Maps(torch.rand(3, 2, 2), torch.rand(3, 6), 0.0) for _ in range(2))
    maps = {symbol: Decomposition(torch.randn(3, 7, 7), torch.randn(3, 7, 7), None, 0.0) for symbol in ("RS(S)", "RS(S) - RS(B)")}
    unicam = {"distilled": Maps(torch.rand(3, 7, 7), torch.rand(3, 6), 0.0), "residual": new, "missed": missed}
    return kdx.LayerResult(unicam, maps, {}, {})


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_layer_and_an_explanation_name_kinds_and_grids() -> None:
    layer = layer_result()
    images = np.zeros((3, 3, 16, 16), np.float32)
    assert titles(layer.figure(images)) == ["image", "RS(S) − RS(B) (7 × 7)", "RS(S) (7 × 7)", "distilled (7 × 7)", "missed (2 × 2)"]
    assert titles(layer.figure(kinds=["residual", "missed"], index=1)) == ["residual (2 × 2)", "missed (2 × 2)"]
    explanation = kdx.Explanation({"layer3": layer, "layer4": layer}, {"student": torch.zeros(3, 5)})
    figure = explanation.figure(images, index=[2, 0])
    assert titles(figure) == ["image", "layer3 (7 × 7)\nRS(S) − RS(B)", "layer4 (7 × 7)\nRS(S) − RS(B)"]
    assert len(figure.axes) == 2 * 3 + 2
    limit = float(layer.score_maps["RS(S) - RS(B)"].maps[[2, 0]].abs().max())
    assert ticks(figure.axes[-1]) == [f"{-limit:.2g}", "0", f"{limit:.2g}"]


def test_maps_of_classes_have_their_own_scales() -> None:
    maps = kdx.ClassMaps(*(RNG.random(shape) for shape in ((2, 3, 3), (2, 4), (2,), (2, 5))))
    figure = maps.figure()
    assert ticks(figure.axes[-1]) == ["0", "1"] and "own" not in titles(figure)
    assert titles(figure) == ["3 × 3 cells"]


@pytest.mark.parametrize("format_", ["png", "svg", "pdf"])
def test_formats(tmp_path: Path, format_: str) -> None:
    first, again = (UNICAM.save(tmp_path / f"{name}.{format_}").read_bytes() for name in ("first", "again"))
    assert first == again
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[format_])
    if format_ == "svg":
        text = first.decode()
        assert "4 × 5 cells" in re.findall(r"<text[^>]*>([^<]*)</text>", text) and "<script" not in text
        assert set(re.findall(r'href="(.)', text)) <= {"d", "#"}  # nothing is loaded from elsewhere


def test_other_colour_maps_and_options() -> None:
    figure = UNICAM.figure(colour_map="cividis", cells="raw", index=0)
    map_ = UNICAM.maps[0]
    drawn = np.asarray(figure.axes[0].get_images()[0].get_array())
    place = np.unravel_index(map_.argmax(), map_.shape)
    step = drawn.shape[0] // 4
    top = np.asarray(matplotlib.colormaps["cividis"](1.0))[:3] * 255
    assert np.abs(drawn[place[0] * step + step // 2, place[1] * step + step // 2] - top).max() <= 1
    empty = Maps(np.zeros((1, 3, 3)), np.zeros((1, 2)), 0.0).figure()
    assert [text.get_text() for text in empty.axes[0].texts] == ["empty map"]
    nine = Maps(np.ones((9, 3, 3)), np.zeros((9, 2)), 0.0).figure()  # two lines, with one colour bar
    assert len(nine.axes) == 2 * 8 + 1


def test_a_notebook_shows_one_picture_without_scripts() -> None:
    text = Maps(RNG.random((30, 4, 4)), RNG.random((30, 2)), 0.0)._repr_html_()
    assert re.fullmatch(r'<figure><img src="data:image/png;base64,[\w+/=]+" alt="[^"<]*"><figcaption>[^<]*</figcaption></figure>', text)
    assert "the first 8 of 30 images" in text and len(text) < 100_000
    data = re.search(r"base64,([\w+/=]+)", text)
    assert data and Image.open(io.BytesIO(base64.b64decode(data[1]))).format == "PNG"
    assert Maps(np.zeros((0, 3, 3)), np.zeros((0, 2)), 0.0)._repr_html_() == "<p>Maps: 0 images</p>"
    assert "layer3" not in layer_result()._repr_html_()


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Maps(np.ones((401, 2, 2)), np.zeros((401, 2)), 0.0)
    for use, text in (
        (lambda: UNICAM.save(tmp_path / "figure.bmp"), "written as figure.bmp"),
        (lambda: UNICAM.figure(index=3), "no image 3"),
        (lambda: UNICAM.figure(index=[]), "no image to draw"),
        (lambda: UNICAM.figure(np.zeros((2, 8, 8, 3), np.uint8)), "2 rows"),
        (lambda: UNICAM.figure(colour_map="cividi"), "no colour map"),
        (lambda: many.figure(), "401 pictures"),
        (lambda: layer_result().figure(kinds=["distiled"]), "no maps of the kind 'distiled'"),
    ):
        with pytest.raises(kdx.KdxError, match=text):
            use()
    with pytest.raises(TypeError, match="no option 'colour'"):
        UNICAM.figure(colour="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="has one"):
        UNICAM.figure(kinds=["distilled"])
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    with pytest.raises(kdx.KdxError, match="no display"):
        UNICAM.show()


def test_show_draws_into_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "a window")
    monkeypatch.setattr(pyplot, "show", lambda: shown.extend(pyplot.get_fignums()))
    options: FigureOptions = {"index": [0, 2]}
    UNICAM.show(**options)
    (number,) = shown
    assert len(pyplot.figure(number).axes) == 3
    pyplot.close(number)


def test_the_lightness_of_the_colours_rises_steadily() -> None:
    """So the order of values is visible for every kind of colour vision, and in grey print."""
    for deficiency in DEFICIENCIES:
        lightness = seen(overlays.colours(), deficiency)[:, 0]
        assert (np.diff(lightness) > -0.05).all() and lightness[-1] - lightness[0] > 45
        assert (np.diff(lightness[::8]) > 0).all()
