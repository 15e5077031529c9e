"""A short timed trial of a run: the seconds of decoding, of the passes, and of maps and scores, on this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kdx import threads
from kdx.data.images import Images, decoded, load_references
from kdx.explain.explainer import Explainer
from kdx.explain.graph import largest_size
from kdx.explain.settings import Settings
from kdx.explain.whole_set import SetRows, measure_set
from kdx.features.rows import InMemory
from kdx.features.target import Target
from kdx.runs.cost import CHUNK, Pass, SetCost, Work
from kdx.runs.geometry import products_per_second
from kdx.runs.plan import Plan

Clock = Callable[[], float]

_SECONDS = 2.0
"""The approximate limit of one part of a trial, unless a batch takes longer."""

_SET_IMAGES = 512
"""The most images of the trial of the sweeps."""

_WRITTEN = 1 << 26


class _Written(TorchDispatchMode):
    """Counts the numbers that operators with known operations write: convolutions, products and attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.count += (result[0] if isinstance(result, tuple) else result).numel()
        return result


def counted_pass(explainer: Explainer, size: tuple[int, int]) -> Pass:
    """The operations of a pass, counted by PyTorch. The explainer must run in PyTorch."""
    images = torch.zeros(2, 3, *size)
    explainer.features(images)  # the first pass also checks the networks
    with FlopCounterMode(display=False) as counter, _Written() as written:
        explainer.features(images)
    return Pass(counter.get_total_flops() / len(images), written.count / len(images))


@contextmanager
def opened(plan: Plan, folder: Path | None, announce: Callable[[str], None]) -> Iterator[tuple[Explainer, tuple[int, int]]]:
    """The explainer of a plan, opened for images of the size that its networks take, and that size. Arguments: as in `Plan.explainer`."""
    with plan.explainer(folder, announce) as explainer:
        size = largest_size(record.image_size for record in explainer.networks().values())
        explainer.open(size)
        yield explainer, size


@dataclass(frozen=True)
class Speed:
    """The results of a trial.

    decoding, passes, maps: seconds per image, the last two for all networks. maps is for the geometries batch and reference, and None if
    it was not measured. linear and quadratic: the sweeps of the geometry ``whole`` over n images take linear n + quadratic n^2 seconds;
    None if they were not measured. disk: bytes per second that reach the disk. on_gpu: whether the networks run on a GPU, so that decoding
    and passes do not share the processor.
    """

    decoding: float
    passes: float
    maps: float | None
    linear: float | None
    quadratic: float | None
    disk: float
    on_gpu: bool

    def seconds(self, work: Work, geometry: str) -> dict[str, float]:
        """The seconds of each stage."""
        n, costs = work.images, work.stages(geometry)
        stages = {"decoding": n * self.decoding, "passes": n * self.passes}
        if geometry == "whole":
            assert self.linear is not None and self.quadratic is not None
            stages["features"] = costs["features"].disk / self.disk
            unread = max(0.0, costs["sweeps"].disk - work.feature_bytes) if work.feature_bytes > work.memory else 0.0
            stages["sweeps"] = self.linear * n + self.quadratic * n**2 + unread / self.disk
        else:
            assert self.maps is not None
            stages["maps and scores"] = n * self.maps
        return stages | {"results": costs["results"].disk / self.disk + CHUNK * costs["results"].chunks}


def timed_trial(
    plan: Plan,
    explainer: Explainer,
    size: tuple[int, int],
    work: Work,
    geometry: str,
    announce: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> Speed:
    """Decode one batch, pass it through the networks, and measure maps and scores as the geometry does.

    clock: measures the trial. With one thread on a busy machine, ``time.process_time`` gives the times of an idle machine.
    """
    announce(f"Trial: decoding, passes and geometry of {len(plan.batches[0])} images.")
    images, decoding = decoding_trial(plan, size, clock)
    levels = images.levels
    passes = _best(lambda: explainer.features(levels), clock) / len(levels)
    maps = linear = quadratic = None
    if geometry == "whole":
        linear, quadratic = _sweeps(plan, work, clock)
    else:
        maps = _maps(plan, explainer, images, size, geometry, clock) / len(levels) - passes
    on_gpu = explainer.choice.device.type == "cuda"
    return Speed(decoding, passes, None if maps is None else max(maps, 0.0), linear, quadratic, _disk_rate(clock), on_gpu)


def decoding_trial(plan: Plan, size: tuple[int, int], clock: Clock = time.perf_counter) -> tuple[Images, float]:
    """The images of a batch, and the seconds per image of decoding them with the run's threads. Files may be in the system's cache."""
    indices = plan.indices[plan.batches[0]]
    few = max(1, threads.available_cores() if plan.options.workers is None else plan.options.workers)
    batches: list[Any] = [indices[:few]]  # the first images also start the threads
    batches += [indices] * 2
    times, result = [], None
    with decoded(plan.dataset, iter(batches), size, plan.options.workers) as parts:
        start = clock()
        for part in parts:
            result = part
            times.append(clock() - start)
    assert result is not None
    return result, (times[-1] - times[0]) / (2 * len(indices))


def _maps(plan: Plan, explainer: Explainer, images: Images, size: tuple[int, int], geometry: str, clock: Clock) -> float:
    """The seconds of the passes, maps and scores of a batch."""
    if geometry == "reference":
        references = plan.references()
        explainer.use_references(load_references(plan.dataset, references, size), plan.target(references))
    target, labels = plan.target(images.kept), torch.from_numpy(plan.dataset.labels[images.kept])

    def explained() -> None:
        _, layers = explainer.explain(images.levels, target, (plan.options.seed, 0), classes=labels)
        for layer in layers.values():
            for kind in layer.maps.values():
                kind.maps.numpy(force=True)  # on a GPU a batch is complete when its maps are on the CPU

    return _best(explained, clock)


def _sweeps(plan: Plan, work: Work, clock: Clock) -> tuple[float, float]:
    """The seconds a and b of sweeps that take a n + b n^2, from two sets of random features of the shapes of the run."""
    per_pair = SetCost.of(1, work.shapes, work.precision, work.pooled).operations
    rate = products_per_second()
    width = sum(channels * height * width for by_layer in work.shapes.values() for channels, height, width in by_layer.values())
    most = min(_SET_IMAGES, int((_SECONDS * rate / 4 / per_pair) ** 0.5), (1 << 28) // (4 * width))
    n = max(64, 1 << (most.bit_length() - 1)) if most else 64
    small, large = _swept(plan, work, n // 2, clock), _swept(plan, work, n, clock)
    quadratic = max((large - 2 * small) / (n**2 / 2), per_pair / rate)
    return max(0.0, large / n - quadratic * n), quadratic


def _swept(plan: Plan, work: Work, n: int, clock: Clock) -> float:
    """The seconds of the sweeps over n images with random features, for all layers."""
    generator, labels, seconds = torch.Generator().manual_seed(0), torch.arange(n) % 4, 0.0
    settings: Settings = plan.options
    for layer in work.layers:
        features = {}
        for role in work.roles:
            channels, height, width = work.shapes[role][layer]
            rows = torch.randn(n, height * width * channels, generator=generator) + labels[:, None] / 10
            features[role] = SetRows(InMemory(rows.relu()), (channels, height, width))

        def measured(features: dict[str, SetRows] = features) -> None:
            measure_set(features, Target.of(labels), settings, lambda kind, shape: torch.empty(shape), shuffled=True)

        seconds += _best(measured, clock, 2)
    return seconds


def _best(call: Callable[[], object], clock: Clock, most: int = 3) -> float:
    """The shortest time of up to ``most`` calls after one warm-up call; fewer if they are slow. It includes the work of a GPU."""
    call()
    best, total = float("inf"), 0.0
    for _ in range(most):
        start = clock()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, seconds := clock() - start)
        total += seconds
        if total > _SECONDS:
            break
    return best


def _disk_rate(clock: Clock) -> float:
    """The bytes per second of a file that is written to the temporary folder and flushed to the disk."""
    content = np.random.default_rng(0).bytes(_WRITTEN)
    with tempfile.TemporaryDirectory() as name, (Path(name) / "trial").open("wb") as file:
        start = clock()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (clock() - start)
