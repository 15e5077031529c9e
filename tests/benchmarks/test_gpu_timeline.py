"""The timeline of a run, at a small size on the CPU: every stage of every batch is in it."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from benchmarks import gpu_timeline
from benchmarks.gpu_timeline import STAGES

SMALL = "kdx:resnet,width=4,depth=1-1-1-1,classes=10,block=basic,stem=imagenet"


@pytest.mark.slow
def test_every_stage_of_every_batch_is_in_the_timeline() -> None:
    record = gpu_timeline.measure(48, 16, "cpu", network=SMALL, side=32)
    assert all(rate > 0 for rate in record["images_per_second"].values())
    batch, whole = record["commands"]
    for result in (batch, whole):
        assert result["images"] == 48 and set(result["stages"]) == set(STAGES) and not result["gpu"]
        # Except the store, all stages are in the thread of the loop here, so they add up to less than the command.
        assert 0 < sum(result["stages"].values()) - result["stages"]["store"] < result["seconds"]
        assert result["loop"] < result["seconds"]
    counts = Counter(stage for stage, *_ in record["spans"])
    assert counts == {
        "decode": 3 + 1,  # after the last batch, the loop waits once more
        "target": 3,
        "upload": 3 * 3,  # the images; the target, which is first copied to pinned memory on a GPU
        "passes": 3,
        "geometry": 3,
        "results": 3,
        "store": 3,
        "waiting": 3,
    }
    assert all(start <= end for _, start, end, _ in record["spans"])
    output = io.StringIO()
    gpu_timeline.show(record, Console(file=output, width=120))
    assert "geometry whole" in output.getvalue() and "decoding, one thread" in output.getvalue()
