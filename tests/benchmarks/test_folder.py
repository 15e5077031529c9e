"""The benchmark of a folder of JPEGs, at a small size: it times whole runs, and memory does not grow."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import folder
from kdx.data.dataset import open_data

SMALL = "kdx:resnet,width=8,depth=1-1-1-1,classes=10,block=basic,stem=imagenet"


def test_the_smaller_folder_holds_images_of_the_larger(tmp_path: Path) -> None:
    folder.draw(tmp_path, 11)
    few, many = (open_data(str(tmp_path / name)) for name in ("few", "many"))
    assert (len(few), len(many)) == (11, 44) and set(few.ids) < set(many.ids)
    assert few.classes == tuple(sorted(folder.CLASSES))
    assert {few.read(index).size for index in range(11)} == {folder.PICTURE}
    with Image.open(tmp_path / "few" / few.ids[0]) as image:
        assert image.format == "JPEG"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_round_times_every_part_and_memory_does_not_grow() -> None:
    measurement = folder.measure(103, 2, network=SMALL, side=64, batch=10)
    assert {part: len(seconds) for part, seconds in measurement["samples"].items()} == dict.fromkeys(folder.PARTS, 2)
    for part, count in (("decoding", 103), ("inference", 103), ("whole", 103), ("whole of more", 412)):
        lower, median, upper = measurement["images_per_second"][part]
        assert count / max(measurement["samples"][part]) <= lower <= median <= upper <= count / min(measurement["samples"][part])
    assert measurement["ratios"]["whole over the slower"][0] > 1
    batch = 10 * 3 * 64 * 64 * 4
    assert measurement["peak_bytes"]["whole of more"] - measurement["peak_bytes"]["whole"] < 20 * batch  # after 30 more batches
    # Two maps of 2 x 2 per image, and its row. The pictures and the page do not grow.
    assert 0 < measurement["bytes_per_1000_images"] < 1e6
