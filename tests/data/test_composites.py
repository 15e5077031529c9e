"""Composites: the masks are exact, an uninformative cue carries no information, and images follow from the arguments alone."""

from __future__ import annotations

import dataclasses
import doctest

import numpy as np
import pytest
from numpy.typing import NDArray

from kdx.data import planted_cues as module
from kdx.data.planted_cues import BOX, CLASSES, CUES, SIDE, Composites, Cue, draw_composites


def changed(a: Composites, b: Composites) -> NDArray[np.bool_]:
    """The pixels [n, SIDE, SIDE] at which two sets of images differ in any channel."""
    return np.asarray((a.images != b.images).any(1))


def fills(depends: object) -> bool:
    """Whether nearly all pixels of a box are True, and some on each of its edges: then no smaller box contains them."""
    pixels = np.asarray(depends)
    return bool(pixels.mean() > 0.9 and all(edge.any() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])))


def information(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """The mutual information of two series of classes, in nats, from their joint frequencies."""
    joint = np.zeros((CLASSES, CLASSES))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum())


@pytest.mark.parametrize("kind", CUES)
def test_shapes_types_and_ranges(kind: Cue) -> None:
    drawn = draw_composites(kind, 21, 3)
    assert drawn.images.shape == (21, 3, SIDE, SIDE) and drawn.images.dtype == np.float32
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1
    assert drawn.labels.shape == drawn.cues.shape == (21,) and set(drawn.labels) <= set(range(CLASSES))
    for masks in (drawn.planted, drawn.common):
        assert masks.shape == (21, SIDE, SIDE) and masks.dtype == bool
        assert (masks.sum((1, 2)) == BOX * BOX).all()
    assert not (drawn.planted & drawn.common).any()


@pytest.mark.parametrize("kind", CUES)
def test_the_cue_changes_exactly_the_planted_region(kind: Cue) -> None:
    """Nothing outside the mask depends on the cue, and the mask is the smallest box of the pixels that do, over all cues."""
    true, other = draw_composites(kind, 300, 5), draw_composites(kind, 300, 5, informative=False)
    assert (true.labels == other.labels).all() and (true.planted == other.planted).all() and (true.common == other.common).all()
    assert not (changed(true, other) & ~true.planted).any()
    same = true.cues == other.cues
    assert 20 < same.sum() < 90 and not changed(true, other)[same].any() and changed(true, other)[~same].any((1, 2)).all()
    in_box = changed(true, other)[true.planted].reshape(-1, BOX, BOX)  # the mask of each image is one box, row by row
    assert fills(in_box.any(0))


def test_the_glyph_changes_exactly_the_common_region() -> None:
    both, without = draw_composites("shape", 300, 6), draw_composites("shape", 300, 6, without_glyph=1)
    assert not without.common.any() and (without.planted == both.planted).all()
    assert not (changed(both, without) & ~both.common).any()
    in_box = changed(both, without)[both.common].reshape(-1, BOX, BOX)
    assert fills(in_box.any(0))
    for label in range(CLASSES):  # a glyph depends on its class alone, and no two are equal
        assert (in_box[both.labels == label].any(0) == module._glyphs()[label]).all()
    assert len({glyph.tobytes() for glyph in module._glyphs()}) == CLASSES


def test_kinds_differ_only_in_the_planted_region() -> None:
    drawn = [draw_composites(kind, 50, 7) for kind in CUES]
    for other in drawn[1:]:
        assert (other.labels == drawn[0].labels).all()
        assert not (changed(drawn[0], other) & ~drawn[0].planted).any()


@pytest.mark.parametrize("kind", CUES)
def test_each_cue_names_its_class(kind: Cue) -> None:
    """Without noise, the cues of two classes differ for every variation within a class."""
    variations = np.linspace(0, 1, 25, endpoint=False)
    boxes = np.array(
        [[np.broadcast_to(module._cue(kind, number, value), (3, BOX, BOX)) for value in variations] for number in range(CLASSES)]
    )
    for a in range(CLASSES):
        for b in range(a):
            distances = np.abs(boxes[a][:, None] - boxes[b][None]).mean((2, 3, 4))
            assert distances.min() > 0.05, (a, b)  # the noise of such a mean has a standard deviation below 0.01


@pytest.mark.slow
def test_an_uninformative_cue_carries_no_information() -> None:
    """The plug-in estimate from n samples exceeds the true value by about (CLASSES - 1)^2/(2n)."""
    n = 4000
    drawn = draw_composites("colour", n, 8, informative=False)
    bias = (CLASSES - 1) ** 2 / (2 * n)
    assert information(drawn.labels, drawn.cues) < 3 * bias
    assert information(drawn.labels, draw_composites("colour", n, 8).cues) == pytest.approx(np.log(CLASSES), abs=0.02)


def test_places_and_sides_carry_no_information() -> None:
    """The places of both boxes are independent of the label: each class has the same mean mask, up to sampling error."""
    drawn = draw_composites("place", 3000, 9)
    for masks in (drawn.planted, drawn.common):
        means = np.array([masks[drawn.labels == label].mean(0) for label in range(CLASSES)])
        assert np.abs(means - masks.mean(0)).max() < 5 * 0.5 / np.sqrt(3000 / CLASSES)
        assert 0.45 < masks[:, :, : SIDE // 2].any((1, 2)).mean() < 0.55  # left half or right half


def test_shares_of_missing_parts() -> None:
    drawn = draw_composites("texture", 3000, 10, without_glyph=0.25, without_cue=0.5)
    glyph, cue = drawn.common.any((1, 2)), drawn.planted.any((1, 2))
    assert (glyph | cue).all()
    assert 1 - glyph.mean() == pytest.approx(0.25, abs=0.03) and 1 - cue.mean() == pytest.approx(0.5, abs=0.03)
    assert not draw_composites("texture", 5, 10, without_cue=1).planted.any()


@pytest.mark.parametrize("kind", CUES)
def test_the_same_arguments_give_the_same_images(kind: Cue) -> None:
    first, second, third = draw_composites(kind, 9, 11), draw_composites(kind, 9, 11), draw_composites(kind, 9, 12)
    for field in dataclasses.fields(Composites):
        assert (getattr(first, field.name) == getattr(second, field.name)).all()
    assert (first.images != third.images).any()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind"):
        draw_composites("smell", 4, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        draw_composites("colour", 0, 0)
    for glyph, cue in ((-0.1, 0.0), (0.6, 0.6)):
        with pytest.raises(ValueError, match="sum"):
            draw_composites("colour", 4, 0, without_glyph=glyph, without_cue=cue)


def test_docstring_example() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
