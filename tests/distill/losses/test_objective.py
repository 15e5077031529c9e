"""The losses as the loop uses them: of batches, with adapters and memory, alone and combined."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdx.distill import METHODS, Batch, Objective, Outputs, Requirements, Shapes, TrainingSettings
from kdx.distill import losses as functions
from kdx.distill.losses import LABELS
from kdx.distill.losses.contrast import Contrast
from kdx.distill.losses.hints import FeatureOverhaul
from kdx.distill.losses.review import Fusion, Review
from kdx.errors import KdxError
from tests.distill.losses import slow_formulas as slow
from tests.distill.losses.batches import CLASSES, IMAGES, SETTINGS, SHAPES, STUDENT, TEACHER, N, batch, objective


@pytest.mark.parametrize("method", METHODS)
def test_no_loss_is_zero_for_different_networks(method: str) -> None:
    """One known implementation of attention transfer normalises over the wrong axis, so its loss is always 0."""
    parts = objective(method)(batch())
    assert set(parts) == {LABELS, method}
    assert float(parts[method].detach()) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_the_adapters_alone(method: str) -> None:
    made, inputs = objective(method), batch()
    needs = METHODS[method].requirements
    assert bool(list(made.parameters())) == needs.adapters
    made(inputs)[method].backward()
    logits, features = inputs.student.logits.grad, inputs.student.features[-1].grad
    before = inputs.student.pre_activations[-1].grad
    assert (logits is not None) == needs.logits
    assert (before is not None) == needs.pre_activations
    assert (features is not None) == (needs.pairs != "none" and not needs.pre_activations)
    gradients = [gradient for gradient in (logits, features, before) if gradient is not None]
    gradients += [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients) and any(bool(gradient.any()) for gradient in gradients)
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert inputs.teacher.logits.grad_fn is None and all(feature.grad_fn is None for feature in inputs.teacher.features)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_widened(method: str) -> None:
    """Outputs in bfloat16 give the loss of the same numbers in float32, also under autocast."""
    inputs = batch(torch.bfloat16)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        parts = objective(method)(inputs)
    torch.manual_seed(1)
    wide = Batch(inputs.student.wide(), inputs.teacher.wide(), inputs.labels, inputs.indices)
    expected = objective(method)(wide)
    assert parts[method].dtype == torch.float32 and bool(torch.isfinite(parts[method].detach()))
    torch.testing.assert_close(parts[method], expected[method])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "crd"])  # whose negatives are drawn row by row
def test_the_order_of_a_batch_does_not_matter(method: str) -> None:
    inputs, order = batch(), torch.randperm(N)

    def permuted(given: Outputs) -> Outputs:
        maps = (tuple(x[order] for x in given.features), tuple(x[order] for x in given.pre_activations))
        return Outputs(given.logits[order], *maps, given.head)

    other = Batch(permuted(inputs.student), permuted(inputs.teacher), inputs.labels[order], None)
    torch.testing.assert_close(objective(method)(other)[method], objective(method)(inputs)[method])


def test_combinations_add_up() -> None:
    settings = TrainingSettings(alpha=0.25, temperature=2.0, beta=10.0)
    inputs = batch()
    combined = objective("at:0.5+dist,inter=1:3+kd", settings)(inputs)
    alone = {method: objective(method, settings)(inputs) for method in ("kd", "at", "dist,inter=1")}
    assert list(combined) == [LABELS, "at", "dist", "kd"]
    torch.testing.assert_close(combined["kd"], alone["kd"]["kd"])
    torch.testing.assert_close(combined["at"], 0.5 * alone["at"]["at"])
    torch.testing.assert_close(combined["dist"], 3 * alone["dist,inter=1"]["dist"])
    torch.testing.assert_close(combined[LABELS], alone["kd"][LABELS])  # 1 - alpha
    torch.testing.assert_close(alone["at"][LABELS], torch.nn.functional.cross_entropy(inputs.student.logits, inputs.labels))
    torch.testing.assert_close(functions.summed(combined), torch.stack(list(combined.values())).sum())
    assert objective("rkd+at").requirements == Requirements(pairs="all")
    assert objective("rkd+crd+kd").requirements == Requirements(logits=True, pairs="last", adapters=True, memory=True, classes=True)
    twice = objective("dkd,standardise=1", settings)(inputs)["dkd"]
    wide = [functions.standardised(part.logits) for part in (inputs.student, inputs.teacher)]
    torch.testing.assert_close(twice, functions.decoupled_kd(wide[0], wide[1], inputs.labels, 2.0))
    torch.testing.assert_close(objective("lskd", settings)(inputs)["lskd"], objective("kd,standardise=1", settings)(inputs)["kd"])


def test_mixed_images_are_refused_by_losses_of_classes() -> None:
    mixed = replace(batch(), labels=torch.full((N, CLASSES), 1 / CLASSES))
    for method, entry in METHODS.items():
        if entry.requirements.classes:
            with pytest.raises(KdxError, match="one class per image"):
                objective(method)(mixed)
        else:
            assert bool(torch.isfinite(functions.summed(objective(method)(mixed)).detach()))


def test_equal_widths_need_no_adapter() -> None:
    same = Objective("fitnet", Shapes(TEACHER, TEACHER, CLASSES), SETTINGS)
    inputs = batch()
    assert not list(same.parameters())
    equal = same(replace(inputs, student=inputs.teacher))
    assert float(equal["fitnet"]) == 0


def test_the_margin_is_the_mean_negative_response() -> None:
    loss, inputs = FeatureOverhaul(SHAPES, SETTINGS), batch()
    loss(inputs)
    feature = inputs.teacher.pre_activations[0].numpy().astype(np.float64)
    expected = [channel[channel < 0].mean() for channel in feature.transpose(1, 0, 2, 3)]
    negatives = loss.get_buffer("negatives0")
    np.testing.assert_allclose((negatives[0] / negatives[1]).numpy(), expected)
    loss(inputs)  # the same responses again
    np.testing.assert_allclose((negatives[0] / negatives[1]).numpy(), expected)
    loss.eval()
    before = negatives.clone()
    margin = torch.tensor(expected)
    last = functions.partial_distance(
        loss.adapters[1](inputs.student.pre_activations[1]),
        torch.nn.functional.adaptive_avg_pool2d(inputs.teacher.pre_activations[1], 4),
        loss.get_buffer("negatives1")[0] / loss.get_buffer("negatives1")[1],
    )
    first = functions.partial_distance(loss.adapters[0](inputs.student.pre_activations[0]), inputs.teacher.pre_activations[0], margin)
    torch.testing.assert_close(loss(inputs), first / 2 + last)
    assert torch.equal(negatives, before)


def test_contrast_with_banks_is_its_formula() -> None:
    torch.manual_seed(0)
    loss, inputs = Contrast(SHAPES, SETTINGS, negatives=5, width=4, tau=0.5, momentum=0.25), batch()
    assert inputs.indices is not None
    banks = {role: loss.get_buffer(f"bank_{role}").clone().double().numpy() for role in ("student", "teacher")}
    torch.manual_seed(7)
    value = float(loss(inputs).detach())
    torch.manual_seed(7)
    negatives = loss._sampled(inputs.labels)
    total, embedded = 0.0, {}
    for role, outputs_ in (("student", inputs.student), ("teacher", inputs.teacher)):
        raw = loss.embed[role](outputs_.features[-1].mean((2, 3))).detach().double().numpy()
        embedded[role] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    for role, other in (("student", "teacher"), ("teacher", "student")):
        positive = np.array([a @ banks[other][i] / 0.5 for a, i in zip(embedded[role], inputs.indices, strict=True)])
        negative = np.array([[a @ banks[other][i] / 0.5 for i in row] for a, row in zip(embedded[role], negatives, strict=True)])
        normaliser = IMAGES * float(np.exp(np.concatenate([positive[:, None], negative], 1)).mean())
        assert float(loss.get_buffer(f"log_normaliser_{other}")) == pytest.approx(np.log(normaliser), rel=1e-5)
        total += slow.contrast(positive, negative, normaliser, IMAGES)
    assert value == pytest.approx(total, rel=1e-5)
    for role in ("student", "teacher"):
        expected = banks[role].copy()
        for index, row in zip(inputs.indices, embedded[role], strict=True):
            mixed = 0.25 * expected[index] + 0.75 * row
            expected[index] = mixed / np.linalg.norm(mixed)
        np.testing.assert_allclose(loss.get_buffer(f"bank_{role}").numpy(), expected, atol=1e-6)


def test_negatives_are_all_images_of_other_classes() -> None:
    labels = torch.tensor([0, 2, 2, 1, 0, 2, 3, 2])
    shapes = Shapes(STUDENT, TEACHER, CLASSES, labels)
    loss = Contrast(shapes, SETTINGS, negatives=4096)
    assert loss.negatives == 4  # the images that are not of class 2
    loss.negatives = 2000
    for c, row in enumerate(loss._sampled(torch.arange(CLASSES))):
        assert set(row.tolist()) == {index for index, label in enumerate(labels.tolist()) if label != c}


def test_fusion_is_its_formula() -> None:
    torch.manual_seed(0)
    fusion = Fusion(3, 2, 4, deepest=False).double().eval()  # running statistics 0 and 1, so that a norm divides by sqrt(1 + eps)
    feature, deeper = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 2, 2).double()
    fused, guided = fusion(feature, deeper)
    weight = {name: parameter.detach().numpy() for name, parameter in fusion.named_parameters()}
    norm = 1 / np.sqrt(1 + 1e-5)
    x = norm * np.einsum("oc,nchw->nohw", weight["reduce.0.weight"][:, :, 0, 0], feature.numpy())
    y = deeper.numpy().repeat(2, 2).repeat(2, 3)
    logits = np.einsum("oc,nchw->nohw", weight["attention.0.weight"][:, :, 0, 0], np.concatenate([x, y], 1))
    a, b = (1 / (1 + np.exp(-(logits + weight["attention.0.bias"][:, None, None])))).transpose(1, 0, 2, 3)
    expected = a[:, None] * x + b[:, None] * y
    np.testing.assert_allclose(fused.detach().numpy(), expected)
    padded, kernel = np.pad(expected, ((0, 0), (0, 0), (1, 1), (1, 1))), weight["expand.0.weight"]
    convolved = sum(
        np.einsum("oc,nchw->nohw", kernel[:, :, dy, dx], padded[:, :, dy : dy + 4, dx : dx + 4]) for dy in range(3) for dx in range(3)
    )
    np.testing.assert_allclose(guided.detach().numpy(), norm * convolved)


def test_review_compares_each_fused_layer() -> None:
    torch.manual_seed(0)
    review, inputs = Review(SHAPES, SETTINGS).eval(), batch()
    fused, last = review.fusions[1](inputs.student.features[1], None)
    _, first = review.fusions[0](inputs.student.features[0], fused)
    target = torch.nn.functional.adaptive_avg_pool2d(inputs.teacher.features[1], 4)
    expected = functions.hierarchical_context(first, inputs.teacher.features[0]) + functions.hierarchical_context(last, target)
    torch.testing.assert_close(review(inputs), expected)


def test_layers_without_positions_are_refused() -> None:
    vectors = Shapes((torch.Size((3, 1, 1)),), (torch.Size((5, 1, 1)),), CLASSES)
    with pytest.raises(KdxError, match=r"only one: features are \[3, 1, 1\] in the student and \[5, 1, 1\] in the teacher"):
        Objective("at", vectors, SETTINGS)
    with pytest.raises(KdxError, match=r"pair 1 has only one: features are \[3, 8, 8\] in the student and \[5, 1, 1\] in the teacher"):
        Objective("at", Shapes(STUDENT[:1], vectors.teacher, CLASSES), SETTINGS)
    with pytest.raises(KdxError, match="cannot be normalised"):
        Objective("catkd", vectors, SETTINGS)
    assert len(Objective("catkd,normalise=0", vectors, SETTINGS).terms) == 1


def test_the_page_states_what_each_method_needs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "distillation.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row for row in rows if len(row) == 8}
    assert list(table) == list(METHODS)
    assert [row[0].strip("`") for row in rows if "arXiv:" in row[-1]] == list(METHODS)  # formulas and sources
    symbols = {0.9: "alpha", 500.0: "beta/2"}
    for name, method in METHODS.items():
        _, _, weight, options, pairs, adapters, memory, mixed = table[name]
        needs, value = method.requirements, objective(name).weights[name]
        assert weight == symbols.get(value, f"{value:g}")
        defaults = inspect.signature(method.loss).parameters
        assert options == ", ".join(f"`{key}`" for key, value in defaults.items() if isinstance(value.default, int | float))
        assert (pairs, adapters == "yes", memory == "yes", mixed == "no") == (needs.pairs, needs.adapters, needs.memory, needs.classes)
