"""The Explainer with a student and a teacher without a base, with a student alone, and with layer names per role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.explain.layer import LayerMethod, measure
from kdx.explain.results import Explanation
from kdx.explain.settings import Settings
from kdx.explain.whole_set import measure_set
from kdx.export.graphs import Preprocessing
from kdx.features.target import Target
from kdx.kernels import geometry, reference
from kdx.models.layer_pairs import layer_names
from kdx.roles import contrasts_among, pairs_among, roles_among, score_maps_among, scores_among
from kdx.scores.uncertainty import permutation_table
from tests import oracle
from tests.explain import written_files
from tests.explain.small_networks import LAYERS, N, Small, close, explainer, features, images, labels, networks
from tests.explain.test_layer import roles
from tests.explain.test_whole_set import rows

PAIR = {"base": None}
ALONE = {"base": None, "teacher": None, "layers": list(LAYERS)}


def one_hot() -> Tensor:
    return nn.functional.one_hot(labels()).double()


def test_what_exists_follows_from_the_roles() -> None:
    pair, alone = {"student", "teacher"}, {"student"}
    assert roles_among(pair) == ("teacher", "student") and roles_among(alone) == ("student",)
    assert list(pairs_among(pair)) == ["missed", "new"] and not pairs_among(alone)
    assert list(scores_among(pair)) == ["FSS(S,T)", "RS(T)", "RS(S)", "RS(T|S)", "RS(S|T)"] and list(scores_among(alone)) == ["RS(S)"]
    assert contrasts_among(pair) == (("RS(S)", "RS(T)"),) and contrasts_among(alone) == ()
    assert [kind.symbol for kind in score_maps_among(pair).values()] == [
        "RS(S)", "RS(T)", "RS(T|S)", "RS(S|T)", "RS(S) - RS(T)", "FSS(S,T)", "FSS(T,S)",
    ]  # fmt: skip
    assert list(score_maps_among(alone)) == ["rs_student"]


def test_student_and_teacher_have_what_they_have_beside_a_base(explained: Explanation[Any]) -> None:
    with explainer(**PAIR) as opened:
        actual = opened(images(), labels())
    assert set(actual.logits) == {"student", "teacher"}
    for layer, result in actual.layers.items():
        expected = explained.layers[layer]
        assert list(result.unicam) == ["missed", "new"]
        assert list(result.scores) == list(scores_among({"student", "teacher"})) and list(result.contrasts) == ["RS(S) - RS(T)"]
        for name, maps in result.unicam.items():
            close(maps.maps, expected.unicam[name].maps, 1e-4)
            close(maps.weights, expected.unicam[name].weights, 1e-4)
        for name, score in result.scores.items():
            assert score.value == pytest.approx(expected.scores[name].value, abs=1e-5)
        for symbol, decomposition in result.score_maps.items():
            close(decomposition.maps, expected.score_maps[symbol].maps, 1e-4)
        for name in ("distilled", "residual"):
            with pytest.raises(kdx.KdxError, match="compares the student with a base"):
                getattr(result, name)


@pytest.mark.parametrize("runtime", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_student_alone_is_mapped_as_autograd_of_the_distance_correlation_does(runtime: str) -> None:
    with explainer(**ALONE, runtime=runtime) as opened:
        actual = opened(images(), labels())
    assert set(actual.logits) == {"student"}
    for layer, result in actual.layers.items():
        x = features()["student"][layer]
        score, weights, maps = reference.unicam(x, None, one_hot(), "relevance")
        assert result.alone is not None and list(result.unicam) == ["alone"]
        close(result.alone.maps, maps, 1e-4)
        close(result.alone.weights, weights, 1e-4)
        assert result.alone.score == pytest.approx(float(score), abs=1e-6)
        assert {name: score.value for name, score in result.scores.items()} == {"RS(S)": pytest.approx(float(score), abs=1e-6)}
        close(result.score_maps["RS(S)"].maps, kdx.decompose(x, labels()).maps, 1e-4)
        assert not result.contrasts and result.missed is None


@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("pooled", [False, True])
def test_unicam_given_nothing_is_autograd_without_a_projection(objective: Any, weighting: Any, pooled: bool) -> None:
    x, _, target = oracle.features()
    rows = nn.functional.one_hot(target).double()
    score, weights, maps = reference.unicam(x, None, rows, objective, weighting, pooled)
    actual = kdx.unicam(x, None, target, objective, weighting, pooled=pooled)
    assert oracle.error(actual.weights, weights) < oracle.TOLERANCE["float64"]
    assert oracle.error(actual.maps, maps) < oracle.TOLERANCE["float64"]
    assert actual.score == pytest.approx(float(score), rel=1e-9)
    if objective == "relevance" and not pooled:
        assert actual.score == pytest.approx(kdx.rs(x, target, permutations=0).value, rel=1e-9)


def test_a_given_network_that_is_unrelated_to_everything_changes_nothing() -> None:
    """Limit: the distances of n orthogonal rows of one length are all equal up to a small e, whose centred matrix is projected away."""
    x, _, target = oracle.features()
    n = len(x)
    a, g = (geometry.u_centered(geometry.distances(m)) for m in (x.flatten(1), nn.functional.one_hot(target).double()))
    basis = torch.stack([a, g]).flatten(1)
    noise = geometry.u_centered(torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).triu(1))
    noise = geometry.u_centered((noise + noise.T).fill_diagonal_(0))
    solution = torch.linalg.lstsq(basis.T, noise.flatten()[:, None]).solution
    b = noise - (basis.T @ solution).view(n, n)  # orthogonal to both
    d = geometry.distances(x.flatten(1))
    given, alone = (geometry.laplacian(d, a, other, g) for other in (b, None))
    assert float(given.score) == pytest.approx(float(alone.score), abs=1e-12) and float(alone.left) == pytest.approx(float(given.left))
    assert oracle.error(given.lap, alone.lap) < 1e-9


def test_reference_mode_of_a_student_alone() -> None:
    known, known_labels = images(10, seed=5), torch.arange(10) % 4
    with explainer(**ALONE) as opened:
        opened.use_references(known, known_labels)
        actual = opened(images(), labels())
    for layer, result in actual.layers.items():
        x, y = features(known)["student"][layer], features()["student"][layer]
        expected = kdx.unicam(y, None, labels(), reference=kdx.ReferenceSet(x, None, known_labels))
        assert result.alone is not None
        close(result.alone.maps, expected.maps, 1e-4)
        # By definition: each image is the last of the references and itself.
        weights = [
            reference.unicam(
                torch.cat([x, y[i : i + 1]]), None, nn.functional.one_hot(torch.cat([known_labels, labels()[i : i + 1]])), "relevance"
            )[1][-1]
            for i in range(N)
        ]
        close(result.alone.weights, torch.stack(weights), 1e-4)


@pytest.mark.parametrize("mismatch", [(None, "given"), ("given", None)])
def test_a_reference_set_with_other_networks_is_refused(mismatch: tuple[str | None, str | None]) -> None:
    x, y, target = oracle.features()
    in_set, in_call = (y if name else None for name in mismatch)
    with pytest.raises(ValueError, match="has given features"):
        kdx.unicam(x, in_call, target, reference=kdx.ReferenceSet(x, in_set, target))


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("present", [("student",), ("student", "teacher")])
def test_the_whole_set_measures_these_roles_as_one_batch_does(present: tuple[str, ...], objective: Any) -> None:
    features, labels = roles(40)
    features = {role: features[role] for role in present}
    target, maps = Target.of(labels), {}

    def output(name: str, shape: tuple[int, int, int]) -> Tensor:
        maps[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        return maps[name]

    actual = measure_set(rows(features), target, Settings(permutations=9, objective=objective), output)
    expected = measure(features, target, permutation_table(40, 0, 0), LayerMethod(geometry.OBJECTIVES[objective]))
    assert oracle.error(actual.products, expected.products) < 1e-9
    for name, of_batch in expected.maps.items():
        assert oracle.error(maps[name], of_batch.maps) < 1e-9
    assert set(maps) == set(expected.maps) | set(score_maps_among(present)) == set(actual.statistics)
    assert {name for name in maps if name in expected.maps} <= actual.null.keys() or objective == "uniqueness"


@pytest.mark.parametrize(
    "layers",
    [pytest.param({"student": "layer2"}, id="alone"), pytest.param({"student": "layer2", "teacher": "layer1"}, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_an_explainer_file_of_these_roles(tmp_path: Path, layers: dict[str, str]) -> None:
    nets = {role: written_files.network(seed, 4 + seed, 3, Preprocessing()) for seed, role in enumerate(layers)}
    file = written_files.written(tmp_path, nets, {layer: names.teacher for layer, names in layer_names([layers]).items()}, (12, 10))
    pixels, labels = written_files.images(9, (12, 10)), torch.arange(9) % 3
    with (
        kdx.Explainer(file=file.path, permutations=9) as ours,
        written_files.by_pytorch(nets, layers=file.layers, permutations=9) as theirs,
    ):
        actual, expected = ours(pixels, labels), theirs(pixels, labels)
        assert ours.layers == theirs.layers and ours.roles == theirs.roles
    for layer, result in expected.layers.items():
        assert list(actual.layers[layer].unicam) == list(result.unicam)
        for name, maps in result.unicam.items():
            assert written_files.worst(actual.layers[layer].unicam[name].maps, maps.maps) <= written_files.MAPS_AGREE
        assert actual.layers[layer].score_maps.keys() == result.score_maps.keys()
        for name, score in result.scores.items():
            assert actual.layers[layer].scores[name].value == pytest.approx(score.value, abs=written_files.SCORES_AGREE)


class Renamed(Small):
    """A student whose second convolution has another name."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.last = self.conv2
        del self.conv2

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.get_submodule("conv1")(images)).relu()
        logits: Tensor = self.fc(self.last(features).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "layers",
    [
        ["student=conv1,teacher=stem", "student=conv2,base=last"],
        [{"student": "conv1", "teacher": "stem"}, {"student": "conv2", "base": "last", "teacher": "conv2"}],
    ],
)
def test_every_role_has_its_own_name_of_a_layer(explained: Explanation[Any], layers: Any) -> None:
    with explainer(base=Renamed(2).eval(), layers=layers) as opened:
        actual = opened(images(), labels())
        assert opened.layers == LAYERS
    for layer, result in actual.layers.items():
        close(result.distilled.maps, explained.layers[layer].distilled.maps, 1e-6)
        assert result.scores["FSS(B,T)"].value == pytest.approx(explained.layers[layer].scores["FSS(B,T)"].value, abs=1e-9)


def test_forms_of_layer_names() -> None:
    expected = layer_names(["student=a,teacher=b"])
    for form in ("a=b", {"a": "b"}, {"student": "a", "teacher": "b"}, [{"student": "a", "teacher": "b"}], ["student=a,base=a,teacher=b"]):
        assert layer_names(form) == expected
    wrong: list[Any] = [[{"teacher": "b"}], [{"student": ""}], [{"student": "a", "tutor": "b"}], ["a", {"student": "a"}]]
    for bad in wrong:
        with pytest.raises(kdx.KdxError, match=r"layer for each role|named twice"):
            layer_names(bad)


@pytest.mark.parametrize("text", ["student=student", "student=teacher,teacher=x", "student=a=b", "student=a=b,teacher=c", "a=b=c"])
def test_names_that_look_like_roles_or_pairs_survive_a_round_trip(text: str) -> None:
    (names,) = layer_names(text).values()
    assert layer_names(str(names)) == {names.student: names}


def test_a_layer_of_an_absent_role_is_refused() -> None:
    nets: dict[str, Any] = networks()
    for absent, layer in (("teacher", "conv1=stem"), ("base", "student=conv1,base=conv2,teacher=stem")):
        with pytest.raises(kdx.KdxError, match=f"names a layer of the {absent}, but there is no {absent}"):
            kdx.Explainer(**nets | {absent: None}, layers=layer)


def test_random_weights_are_a_baseline_of_fss_alone(explained: Explanation[Any]) -> None:
    random = Small(9).eval()
    with explainer(random=random) as opened:
        actual = opened(images(), labels())
    for layer, result in actual.layers.items():
        expected = explained.layers[layer]
        with torch.no_grad():
            x = random.get_submodule(layer)(images() if layer == "conv1" else random.norm(random.conv1(images())).relu())  # type: ignore[operator]
        fss = kdx.fss(x, features()["teacher"][layer], permutations=19)
        assert result.scores["FSS(R,T)"].value == pytest.approx(fss.value, abs=1e-6)
        assert result.scores.keys() - expected.scores.keys() == {"FSS(R,T)"}
        assert result.contrasts.keys() - expected.contrasts.keys() == {"FSS(S,T) - FSS(R,T)"}
        assert result.unicam.keys() == expected.unicam.keys() and result.score_maps.keys() == expected.score_maps.keys()
        close(result.distilled.maps, expected.distilled.maps, 1e-9)
    with pytest.raises(ValueError, match="compared with a teacher"):
        explainer(random=random, teacher=None, layers=list(LAYERS))
