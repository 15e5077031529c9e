"""The references: the registry, the help texts and the page agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from kdx.choices import DATA_KINDS, DATA_REFERENCES, TrainingPresetName
from kdx.data.sample import SAMPLE
from kdx.data.sources import SOURCES
from kdx.distill import TrainingSettings
from kdx.distill.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_every_source_has_a_reference() -> None:
    assert {reference.partition(":")[0] for reference in DATA_REFERENCES if ":" in reference} | {"digits"} == {*SOURCES, SAMPLE}
    kinds = re.sub(r" \(.*?\)", "", DATA_KINDS).replace("a folder of images", "FOLDER").replace(" or ", " ").split(", ")
    assert [kind.strip() for kind in kinds] == [
        name for name in DATA_REFERENCES if not name.startswith(("folder:", "csv:", "npz:", "composites:"))
    ]


def test_the_page_has_every_reference_with_its_description() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.split("## References")[1].split("###")[0], re.M)
    assert {name: text.replace("`", "") for name, text in rows} == DATA_REFERENCES


def test_the_page_has_the_options_of_every_preset() -> None:
    assert set(PRESETS) == set(get_args(TrainingPresetName))
    options = {"learning_rate": "lr"}
    rows = dict(re.findall(r"^\| `(\w+)` \| `(--.+)` \|$", PAGE, re.M))
    for name, settings in PRESETS.items():
        TrainingSettings(**settings)
        written = {
            f"--{options.get(key, key.replace('_', '-'))} {value[0] if isinstance(value, tuple) else value}"
            for key, value in settings.items()
        }
        assert set(re.findall(r"--\S+ \S+", rows[name])) == written
