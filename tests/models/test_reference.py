"""Model references: reading, writing, and file names."""

from __future__ import annotations

import pytest

from kdx import models
from kdx.errors import KdxError


def test_writing_a_reference_is_the_inverse_of_reading_it() -> None:
    text = "package.module:make,width=8,rate=0.5,deep=true,depth=3-4-6-3,kind=basic@folder/a@b.pt"
    parsed = models.parse_reference(text)
    assert parsed.arguments == {"width": 8, "rate": 0.5, "deep": True, "depth": (3, 4, 6, 3), "kind": "basic"}
    assert (parsed.source, parsed.name, parsed.weights, str(parsed)) == ("package.module", "make", "folder/a@b.pt", text)
    assert (
        str(models.parse_reference("timm:resnet18,pretrained=true").with_classes(7).with_weights("w.pt"))
        == "timm:resnet18,num_classes=7@w.pt"
    )
    assert str(models.parse_reference("kdx:resnet,classes=2").with_classes(7)) == "kdx:resnet,classes=2"


@pytest.mark.parametrize(
    "text", ["", "resnet18", "timm:", ":resnet18", "timm:resnet18,", "timm:a,b", "timm:a,b=", "timm:a,b=1,b=2", "timm:a@"]
)
def test_the_error_for_a_malformed_reference_states_the_form(text: str) -> None:
    with pytest.raises(KdxError, match="SOURCE:NAME"):
        models.load(text)


def test_file_names_are_safe() -> None:
    assert models.file_name("timm:resnet18,num_classes=10@runs/s.safetensors") == "resnet18-s"
    assert models.file_name("timm:hub/net x") == "hub-net-x"
