"""The callback for the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdx.callbacks.foreign import ForeignSubclass, inner_module
from kdx.distill.probe import Probe


class HuggingFaceProbe(ForeignSubclass):
    """Logs the scores of a `kdx.Probe` after every epoch of a ``transformers.Trainer``, under LAYER/SCORE (``layer4/FSS(S,T)``).

    It is a ``TrainerCallback``. A callback does not know its Trainer, so it receives the Trainer's ``log``, which writes to its history
    and to all its loggers: ``trainer.add_callback(kdx.callbacks.HuggingFaceProbe(probe, trainer.log))``. Training gives the same weights
    with and without it.

    student: the path of the student in the Trainer's model; by default the model itself, whose first argument is the images. prefix: of
    the logged names. With several processes, the first one computes the scores.

    Raises KdxError if transformers is not installed, and in training if there is no module ``student``.
    """

    packages = ("transformers",)
    base = "TrainerCallback"

    def __init__(self, probe: Probe, log: Callable[[dict[str, float]], None], student: str | None = None, *, prefix: str = "") -> None:
        self._probe, self._log, self._student, self._prefix = probe, log, student, prefix

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any) -> None:
        if state.is_world_process_zero:
            self._log(self._probe(inner_module(model, self._student)).row(self._prefix))
