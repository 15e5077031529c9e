"""Method strings, and the losses that users bring: functions, classes and objects."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdx.distill import Batch, DistillationLoss, Requirements, Shapes, TrainingSettings
from kdx.distill import losses as functions
from kdx.distill.losses import LABELS, LossSettings
from kdx.errors import KdxError
from tests.distill.losses.batches import batch, objective


def own_loss(batch: Batch, scale: float = 2.0) -> Tensor:
    return scale * (batch.student.logits - batch.teacher.logits).abs().mean()


own_loss.requirements = Requirements(logits=True)  # type: ignore[attr-defined]


class OwnLoss(DistillationLoss):
    """A user's class with an adapter."""

    requirements = Requirements(pairs="last", adapters=True)

    def __init__(self, shapes: Shapes, settings: LossSettings, *, power: int = 2) -> None:
        super().__init__(shapes, settings)
        self.label_weight, self.power = 0.5, power
        self.adapter = torch.nn.Linear(shapes.student[-1][0], shapes.teacher[-1][0])

    def forward(self, batch: Batch) -> Tensor:
        student, teacher = (part.features[-1].mean((2, 3)) for part in (batch.student, batch.teacher))
        difference: Tensor = self.adapter(student) - teacher
        return difference.abs().pow(self.power).mean()


class Scaled:
    """A user's object that is called like a function."""

    def __call__(self, batch: Batch, scale: float = 1.0) -> Tensor:
        return own_loss(batch, scale)


own_object = Scaled()
own_partial = partial(own_loss, scale=4.0)


def own_vector(batch: Batch) -> Tensor:
    return batch.student.logits.square()


def own_failure(batch: Batch) -> Tensor:
    raise RuntimeError("first line\nsecond line")


def own_complex(batch: Batch) -> Tensor:
    return 1j * batch.student.logits.sum()


class OwnBrokenLoss(DistillationLoss):
    """A user's class that cannot be constructed."""

    def __init__(self, shapes: Shapes, settings: LossSettings) -> None:
        super().__init__(shapes, settings)
        self.adapter = torch.nn.Linear(shapes.student[-1][7], 1)


NOT_A_LOSS = 3


def test_a_users_own_loss_that_fails_is_named_with_its_place() -> None:
    line = inspect.getsourcelines(own_failure)[1] + 1
    with pytest.raises(KdxError, match=rf"own_failure fails with RuntimeError in test_methods.py, line {line}: first line.\n"):
        objective(f"{__name__}:own_failure")(batch())
    with pytest.raises(KdxError, match=r"OwnBrokenLoss fails with IndexError in test_methods.py"):
        objective(f"{__name__}:OwnBrokenLoss")
    with pytest.raises(KdxError, match=r"returns torch.complex64 \[\], not a scalar"):
        objective(f"{__name__}:own_complex")(batch())


def test_a_users_own_losses() -> None:
    inputs, here = batch(), __name__
    parts = objective(f"{here}:own_loss,scale=3:0.5+kd")(inputs)
    assert list(parts) == [LABELS, f"{here}:own_loss", "kd"]
    torch.testing.assert_close(parts[f"{here}:own_loss"], 0.5 * own_loss(inputs, 3.0))
    made = objective(f"{here}:OwnLoss,power=1")
    assert made.requirements == OwnLoss.requirements and len(list(made.parameters())) == 2
    halved = made(inputs)
    torch.testing.assert_close(2 * halved[LABELS], torch.nn.functional.cross_entropy(inputs.student.logits, inputs.labels))
    assert functions.method_requirements(f"{here}:own_vector") == Requirements(logits=True, pairs="all")
    with pytest.raises(KdxError, match="not a scalar"):
        objective(f"{here}:own_vector")(inputs)
    assert functions.source_hashes("kd") == {}
    hashes = functions.source_hashes(f"{here}:own_loss+{here}:OwnLoss")
    assert len(set(hashes.values())) == 2
    for name in ("own_object", "own_partial"):
        torch.testing.assert_close(objective(f"{here}:{name},scale=3")(inputs)[f"{here}:{name}"], own_loss(inputs, 3.0))
        assert list(functions.source_hashes(f"{here}:{name}")) == [f"{here}:{name}"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fitnets", "no distillation method 'fitnets'.\nDid you mean fitnet?"),
        ("kd+", "'kd\\+' is not a loss"),
        ("", "'' is not a loss"),
        ("kd:-1", "is not a loss"),
        ("kd:1e999", "is not a loss"),
        ("kd:abc", "The weight of kd cannot be 'abc'"),
        ("at+kd:nan", "The weight of kd cannot be 'nan'"),
        ("FitNets", "Did you mean fitnet\\?"),
        ("dkd,nontarge=4", "no option 'nontarge'.\nDid you mean nontarget\\? Choose one of: target, nontarget, standardise"),
        ("kd,temperature=3", "no option 'temperature'.\nGive it to the command: --temperature"),
        ("dkd,target=-4", "cannot be '-4'.\nGive a number from 0."),
        ("kd,standardise=2", "cannot be '2'.\nGive a whole number from 0 to 1."),
        ("crd,negatives=0", "cannot be '0'.\nGive a whole number from 1."),
        ("crd,tau=0", "The option tau of crd cannot be '0'"),
        ("catkd,resolution=0", "The option resolution of catkd cannot be '0'"),
        ("reviewkd,width=-1", "The option width of reviewkd cannot be '-1'"),
        ("at+at:2", "contains at twice"),
        ("kd,standardize=1", "no option 'standardize'.\nDid you mean standardise\\?"),
        ("at,power=2", "no option 'power'.\nGive its name alone"),
        ("crd,width=1.5", "cannot be '1.5'.\nGive a whole number"),
        ("dkd,target=much", "cannot be 'much'.\nGive a number"),
        ("no.such.module:loss", "cannot be imported: No module named 'no'"),
        (f"{__name__}:own_los", "has no loss 'own_los'.\nDid you mean own_loss"),
        (f"{__name__}:NOT_A_LOSS", "is not a loss.\nGive a function"),
        ("torch.nn:Linear", "is not a loss.\nGive a function"),
    ],
)
def test_method_strings_that_name_no_loss_are_refused(method: str, message: str) -> None:
    with pytest.raises(KdxError, match=message):
        TrainingSettings(method=method)


def test_weights_may_have_exponents() -> None:
    terms = functions.parse_method("at:1e+2+kd:.5 + dkd,nontarget=1e-1")
    assert [(term.name, term.factor, term.options) for term in terms] == [
        ("at", 100.0, ()),
        ("kd", 0.5, ()),
        ("dkd", 1.0, (("nontarget", 0.1),)),
    ]


def test_a_loss_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses_of_a_user.py").write_text("def gap(batch, power=2.0):\n    return batch.student.logits.abs().pow(power).mean()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    inputs = batch()
    parts = objective("losses_of_a_user:gap,power=1")(inputs)
    torch.testing.assert_close(parts["losses_of_a_user:gap"], inputs.student.logits.abs().mean())


def test_contrast_needs_images_of_two_classes() -> None:
    shapes = Shapes((torch.Size((4, 2, 2)),), (torch.Size((4, 2, 2)),), classes=3, labels=torch.ones(6, dtype=torch.int64))
    with pytest.raises(KdxError, match="all training images have the same class"):
        functions.Objective("crd", shapes, TrainingSettings())
