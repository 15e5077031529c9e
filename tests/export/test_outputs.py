"""The logits in the outputs of networks: which are recognised, which must be stated, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from kdx.errors import KdxError
from kdx.export.outputs import CLASS_COUNT, LOGITS_OUTPUT, logits_of

LOGITS, POOLED, MAPS = torch.rand(4, 3), torch.rand(4, 8), torch.rand(4, 8, 2, 2)
PREDICTED = LOGITS.argmax(1)


class Pair(NamedTuple):
    first: Tensor
    logits: Tensor


@dataclass
class Data:
    features: Tensor
    pred: Tensor


class Plain:
    """An object of no known kind, with an attribute and a property."""

    def __init__(self, features: Tensor, scores: Tensor) -> None:
        self.features, self.scores = features, scores

    @property
    def pred(self) -> Tensor:
        return self.scores


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        Plain(POOLED, LOGITS),
        (LOGITS, MAPS),
        (MAPS, LOGITS),
        [LOGITS, [MAPS, POOLED]],
        ([MAPS, POOLED], LOGITS),
        (LOGITS, {"feats": [MAPS], "pooled_feat": POOLED}),
        (LOGITS, PREDICTED, torch.arange(12).view(4, 3)),
        {"logits": LOGITS, "out": POOLED},
        {"features": POOLED, "out": LOGITS},
        {"features": POOLED, "pred": LOGITS, "loss": torch.tensor(1.0)},
        {"anything": LOGITS, "maps": MAPS},
        {"pred": PREDICTED, "prediction": LOGITS, "features": POOLED},
        Pair(POOLED, LOGITS),
        Data(POOLED, LOGITS),
        ImageClassifierOutput(logits=LOGITS, hidden_states=(MAPS,)),
        ImageClassifierOutput(loss=torch.tensor(1.0), logits=LOGITS),
    ],
)
def test_logits_are_recognised(output: Any) -> None:
    assert logits_of(output, nn.Module()) is LOGITS
    assert logits_of(output, nn.Module(), any_rank=True) is LOGITS


def test_of_two_matrices_the_module_or_the_number_of_classes_decides() -> None:
    module = nn.Module()
    for output, shapes in (((POOLED, LOGITS), r"0 \[4, 8\], 1 \[4, 3\]"), ({"a": LOGITS, "b": POOLED}, r"a \[4, 3\], b \[4, 8\]")):
        with pytest.raises(KdxError, match=rf"may be the logits: {shapes}\.\n.*logits=[0a] in a model reference, or module\.logits_output"):
            logits_of(output, module)
    setattr(module, CLASS_COUNT, 3)
    assert logits_of((POOLED, LOGITS), module) is LOGITS and logits_of({"a": LOGITS, "b": POOLED}, module) is LOGITS
    with pytest.raises(KdxError, match="Several outputs"):
        logits_of((LOGITS, LOGITS.clone()), module)
    cases: list[tuple[int | str, Any]] = [
        (1, (POOLED, LOGITS)),
        ("a", {"a": LOGITS, "b": POOLED}),
        ("scores", Plain(POOLED, LOGITS)),
        ("pred", Data(POOLED, LOGITS)),
    ]
    for stated, chosen in cases:
        setattr(module, LOGITS_OUTPUT, stated)
        assert logits_of(chosen, module) is LOGITS
    assert logits_of(LOGITS, module) is LOGITS  # a network that returns a plain tensor in eval mode
    with pytest.raises(KdxError, match=r"no output 'pred'\.\nIt returns 0 \[4, 8\], 1 \[4, 3\]"):
        logits_of((POOLED, LOGITS), module)


@pytest.mark.parametrize(
    ("output", "shape"), [(MAPS, r"\[4, 8, 2, 2\]"), ((MAPS, MAPS), "0"), (PREDICTED, r"\[4\]"), ({}, "nothing"), (None, "nothing")]
)
def test_outputs_without_logits_are_refused_with_their_shapes(output: Any, shape: str) -> None:
    with pytest.raises(KdxError, match=rf"does not return logits \[n, classes\]: it returns {shape}"):
        logits_of(output, nn.Module())


def test_a_segmentation_has_an_output_of_another_rank() -> None:
    assert logits_of({"out": MAPS, "aux": MAPS + 1}, nn.Module(), any_rank=True) is MAPS
    assert logits_of((MAPS, PREDICTED), nn.Module(), any_rank=True) is MAPS
