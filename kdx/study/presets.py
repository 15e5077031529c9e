"""Designs that come with kdx: that of the paper, and a small one on handwritten digits."""

from __future__ import annotations

from typing import Any

from kdx.choices import StudyPresetName
from kdx.distill import DEMO
from kdx.distill.presets import PRESETS as TRAINING_PRESETS

PRESETS: dict[StudyPresetName, dict[str, Any]] = {
    "paper": {
        "data": {name: {"training": {"preset": name}} for name in TRAINING_PRESETS},
        "teachers": {"resnet50": "timm:resnet50"},
        "assistants": {"resnet34": "timm:resnet34"},
        "students": {"resnet18": "timm:resnet18"},
        "methods": ["kd", "at"],
        "seeds": 3,
        "layers": ["layer1", "layer2", "layer3", "layer4"],
    },
    "digits": {
        "data": {"digits": "digits"},
        "teachers": {"small": "kdx:resnet,width=12,depth=1", "large": DEMO["teacher"]},
        "assistants": {"medium": "kdx:resnet,width=12,depth=1"},
        "students": {"tiny": DEMO["student"]},
        "methods": ["kd", "at"],
        "seeds": 3,
        "training": {
            "epochs": 30,  # few, so that the study takes about five minutes on two cores
            "teacher_epochs": 5,
            "batch": DEMO["kd"].batch,
            "augment": DEMO["kd"].augment,
            "student_images": DEMO["kd"].student_images,
            "image_size": list(DEMO["kd"].image_size),
            "probe": 64,
        },
        "explain": {"gallery": 16},
    },
}
"""The contents of a study file per preset."""
