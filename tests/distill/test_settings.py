"""Training settings: ranges, and the names that they had before."""

from __future__ import annotations

import pytest

import kdx.distill
from kdx.distill import EpochResult, TrainingSettings
from kdx.errors import KdxError


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "kdd"},
        {"epochs": 0},
        {"batch": 1},
        {"temperature": 0.0},
        {"alpha": 1.5},
        {"learning_rate": float("nan")},
        {"optimizer": "lion"},
        {"seed": -1},
        {"milestones": (2,)},
        {"schedule": "constant", "gamma": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(KdxError):
        TrainingSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "renamed"), [("Settings", TrainingSettings), ("Progress", EpochResult)])
def test_old_names_still_work_and_warn(old: str, renamed: type) -> None:
    with pytest.warns(DeprecationWarning, match=f"kdx.distill.{old} is now kdx.distill.{renamed.__name__}"):
        assert getattr(kdx.distill, old) is renamed
    with pytest.raises(AttributeError, match="no attribute 'Setting'"):
        kdx.distill.Setting  # type: ignore[attr-defined]  # noqa: B018
