"""The callback for PyTorch Lightning."""

from __future__ import annotations

from typing import Any, Literal

from kdx.callbacks.foreign import ForeignSubclass, inner_module
from kdx.distill.probe import Probe


class LightningProbe(ForeignSubclass):
    """Logs the scores of a `kdx.Probe` after every epoch of a PyTorch Lightning training, under LAYER/SCORE (``layer4/FSS(S,T)``).

    It is a ``Callback`` of ``lightning`` or of ``pytorch_lightning``, whichever the program has imported, and logs through
    ``pl_module.log_dict``, so that every logger of the Trainer receives the scores. Training gives the same weights with and without it.

    student: the path of the student in the LightningModule, such as ``network``; by default the LightningModule is the student, and its
    ``forward`` returns the logits. stage: log at the end of the ``train`` epochs, or of the ``validation`` epochs, before checkpoints are
    chosen, so that ``ModelCheckpoint`` can monitor a score. prefix: of the logged names. With several processes, each of them computes
    the scores of the same images.

    Raises KdxError if neither package is installed, and in training if there is no module ``student``.
    """

    packages = ("lightning.pytorch", "pytorch_lightning")
    base = "Callback"

    def __init__(
        self, probe: Probe, student: str | None = None, *, stage: Literal["train", "validation"] = "train", prefix: str = ""
    ) -> None:
        if stage not in ("train", "validation"):
            raise ValueError(f"stage must be 'train' or 'validation', not {stage!r}")
        self._arguments = probe, student, stage, prefix

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log("train", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log("validation", trainer, pl_module)

    def _log(self, ended: str, trainer: Any, pl_module: Any) -> None:
        probe, student, stage, prefix = self._arguments
        if ended == stage and not trainer.sanity_checking:
            pl_module.log_dict(probe(inner_module(pl_module, student)).row(prefix))

    def __reduce__(self) -> Any:  # the class that Python makes for an instance has no name by which pickle could find it
        probe, student, stage, prefix = self._arguments
        return _lightning_probe, (probe, student, stage, prefix)


def _lightning_probe(probe: Probe, student: str | None, stage: Literal["train", "validation"], prefix: str) -> LightningProbe:
    return LightningProbe(probe, student, stage=stage, prefix=prefix)
