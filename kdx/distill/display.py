"""Shows trainings: bars that move within an epoch on a terminal, and lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kdx import progress
from kdx.distill.settings import EpochCallback, EpochResult, StepCallback, StepResult


@contextmanager
def console_reports() -> Iterator[tuple[EpochCallback, StepCallback | None]]:
    """The callbacks that show every epoch and, on a terminal, the steps within it. Without a terminal, no losses are read within epochs."""
    with progress.progress() as show:
        accuracies: dict[str, float | None] = {}

        def on_epoch(result: EpochResult) -> None:
            accuracies[result.network] = result.accuracy
            note = "already there"
            if result.loss is not None:
                note = _note(result.loss, result.parts, result.accuracy, result.images_per_second)
            show(result.network, result.epoch, result.epochs, note)

        def on_step(result: StepResult) -> None:
            done = result.epoch - 1 + result.step / result.steps
            note = _note(result.loss, result.parts, accuracies.get(result.network), result.images_per_second)
            show(result.network, done, result.epochs, note)

        yield on_epoch, on_step if progress.console().is_terminal else None


def _note(loss: float, parts: Mapping[str, float], accuracy: float | None, images_per_second: float | None) -> str:
    """One line: the loss, the accuracy after the last epoch, the speed and the parts of the loss, as far as they are known."""
    measured = "" if accuracy is None else f", validation accuracy {accuracy:.1%}"
    speed = "" if images_per_second is None else f", {images_per_second:,.0f} images/s"
    sum_of_parts = f", {' + '.join(f'{name} {value:.3f}' for name, value in parts.items())}" if len(parts) > 1 else ""
    return f"epochs, loss {loss:.3f}{measured}{speed}{sum_of_parts}"
