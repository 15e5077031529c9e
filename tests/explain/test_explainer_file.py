"""kdx.Explainer with an explainer file: the results of its networks, its description, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.roles import MAPS
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests.explain.written_files import FIXED, MAPS_AGREE, SCORES_AGREE, Written, by_pytorch, images, worst


def both(file: Written, **settings: Any) -> tuple[Explainer, Explainer]:
    return (
        Explainer(file=file.path, permutations=199, **settings),
        by_pytorch(file.networks, layers=file.layers, permutations=199, **settings),
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trio", "pair"])
def test_a_file_explains_as_its_networks_do(which: str, request: pytest.FixtureRequest) -> None:
    file: Written = request.getfixturevalue(which)
    pixels, labels = images(13, seed=2), torch.arange(13) % 3
    ours, theirs = both(file, seed=4)
    with ours, theirs:
        actual, expected = ours(pixels, labels), theirs(pixels, labels)
    assert list(actual.layers) == list(expected.layers) == list(file.layers) and actual.logits.keys() == expected.logits.keys()
    for role, rows in expected.logits.items():
        assert worst(actual.logits[role], rows) <= MAPS_AGREE
    for layer, theirs_at in expected.layers.items():
        ours_at = actual.layers[layer]
        for name in MAPS:
            if getattr(theirs_at, name) is None:
                assert getattr(ours_at, name) is None
                continue
            assert worst(getattr(ours_at, name).maps, getattr(theirs_at, name).maps) <= MAPS_AGREE
            assert worst(getattr(ours_at, name).weights, getattr(theirs_at, name).weights) <= MAPS_AGREE
            assert getattr(ours_at, name).score == pytest.approx(getattr(theirs_at, name).score, abs=SCORES_AGREE)
            assert getattr(ours_at, name).score == pytest.approx(ours_at.scores[MAPS[name].score].value, abs=SCORES_AGREE)
        assert ours_at.score_maps.keys() == theirs_at.score_maps.keys()
        for symbol, decomposition in theirs_at.score_maps.items():
            largest = float(decomposition.maps.abs().max())
            assert float((ours_at.score_maps[symbol].maps - decomposition.maps).abs().max()) <= MAPS_AGREE * largest
            assert ours_at.score_maps[symbol].score == pytest.approx(decomposition.score, abs=1e-4)
        assert ours_at.scores.keys() == theirs_at.scores.keys() and ours_at.contrasts.keys() == theirs_at.contrasts.keys()
        for name, score in theirs_at.scores.items():
            assert ours_at.scores[name].value == pytest.approx(score.value, abs=SCORES_AGREE)
            assert ours_at.scores[name].interval == pytest.approx(score.interval, abs=1e-3)
            assert ours_at.scores[name].p_value == pytest.approx(score.p_value, abs=1.01 / 200)  # one permutation may tie
        for name, (value, interval) in theirs_at.contrasts.items():
            assert ours_at.contrasts[name][0] == pytest.approx(value, abs=SCORES_AGREE)
            assert ours_at.contrasts[name][1] == pytest.approx(interval, abs=1e-3)


@pytest.mark.slow
def test_the_records_of_a_files_networks_are_those_of_the_networks(trio: Written, pair: Written) -> None:
    for file in (trio, pair):
        ours, theirs = both(file)
        with ours, theirs:
            records = theirs.networks()
            if file is pair:  # the file takes one size, the networks any
                records = {role: replace(record, image_size=FIXED) for role, record in records.items()}
            assert ours.networks() == records
            assert (ours.layers, ours.roles, ours.choice.runtime) == (theirs.layers, theirs.roles, "onnx")


@pytest.mark.slow
def test_numpy_in_numpy_out_and_some_of_the_layers(trio: Written) -> None:
    pixels, labels = images(6), np.arange(6) % 2
    with Explainer(file=str(trio.path), permutations=9) as whole, Explainer(file=trio.path, layers={"relu": "layer1.0.bn2"}) as part:
        everything, actual = whole(pixels.numpy(), labels), part(pixels.numpy(), labels)
    assert list(actual.layers) == ["relu"] and part.layers == {"relu": "layer1.0.bn2"}
    maps, same = actual.layers["relu"].new, everything.layers["relu"].new
    assert maps is not None and same is not None
    assert isinstance(maps.maps, np.ndarray) and np.array_equal(maps.maps, same.maps)


def test_an_embedding_of_the_labels_is_the_labels(pair: Written) -> None:
    pixels, labels = images(8), torch.tensor([5, 3, 3, 9, 5, 5, 9, 3])
    with Explainer(file=pair.path, permutations=9) as explainer:
        actual, expected = explainer(pixels, labels), explainer(pixels, torch.eye(10)[labels])
    assert torch.allclose(actual.layers["layer2"].distilled.maps, expected.layers["layer2"].distilled.maps, rtol=1e-5)
    scores = expected.layers["layer2"].scores
    for name, score in actual.layers["layer2"].scores.items():
        assert (score.value, *score.interval) == pytest.approx((scores[name].value, *scores[name].interval), rel=1e-9, abs=1e-12)
        assert score.p_value == scores[name].p_value


def test_targets_are_padded_to_the_width_of_an_engine(pair: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(OnnxRuntimeRunner):
        """A runner whose target has seven columns: an engine has a fixed number."""

        def __init__(self, path: Path, *_: object) -> None:
            super().__init__(path)
            self.inputs = {"images": self.inputs["images"], "target": ("batch", 7)}

    pixels, labels = images(16), torch.arange(16) % 3
    with Explainer(file=pair.path, permutations=9) as explainer:
        expected = explainer(pixels, labels)
    monkeypatch.setattr("kdx.explain.exported.open_file", Narrow)
    with Explainer(file=pair.path, permutations=9) as explainer:
        actual = explainer(pixels, labels)
        assert worst(actual.layers["layer2"].distilled.maps, expected.layers["layer2"].distilled.maps) <= MAPS_AGREE
        with pytest.raises(KdxError, match="The target has 8 columns, and the engine takes 7"):
            explainer(pixels, torch.arange(16) % 8)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"layers": "layer3"}, "does not contain the layer 'layer3'", "It contains layer1=layer2, relu=layer1.0.bn2"),
        ({"layers": {"layer1": "layer3"}}, "does not contain the layer 'layer1=layer3'", "It contains layer1=layer2"),
        ({"layers": "layer1"}, "does not contain the layer 'layer1'", "It contains layer1=layer2"),
        ({"chunk": 4}, "takes a whole batch at once", "Leave the chunk out"),
        ({"objective": "uniqueness"}, "not uniqueness and gap", "the networks themselves"),
        ({"weighting": "elementwise"}, "not relevance and elementwise", "the networks themselves"),
        ({"runtime": "eager"}, "cannot run in PyTorch", "--runtime onnx"),
    ],
)
@pytest.mark.slow
def test_settings_that_a_file_does_not_support_are_an_error(trio: Written, settings: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        Explainer(file=trio.path, **settings)
    assert message in caught.value.problem and hint in caught.value.hint


@pytest.mark.slow
def test_files_of_another_kind_are_refused(features_file: Path, trio: Written, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="is a file of features, not an explainer"):
        Explainer(file=features_file)
    with pytest.raises(KdxError, match="is a file of explainer, not of features"):
        Explainer(student=trio.path, base=trio.path, layers="layer2")
    with pytest.raises(KdxError, match="There is no file"):
        Explainer(file=tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="contains its networks; do not give student, base"):
        Explainer(file=trio.path, student=trio.networks["student"], base=trio.networks["base"])


def test_reference_mode_and_batches_that_do_not_fit_are_errors(pair: Written) -> None:
    with Explainer(file=pair.path) as explainer:
        with pytest.raises(KdxError, match="only with the other images of its batch"):
            explainer.use_references(images(8), torch.arange(8) % 2)
        with pytest.raises(KdxError, match="at least 4 images"):
            explainer(images(3), torch.arange(3) % 2)
        with pytest.raises(KdxError, match="takes images of 12 x 10"):
            explainer(images(8, (12, 11)), torch.arange(8) % 2)
        with pytest.raises(KdxError, match="one class"):
            explainer(images(8), torch.zeros(8, dtype=torch.int64))
        with pytest.raises(KdxError, match="5 rows of labels or class embeddings"):
            explainer(images(8), torch.arange(5) % 2)
        with pytest.raises(KdxError):
            explainer(torch.full((8, 3, *FIXED), torch.nan), torch.arange(8) % 2)
