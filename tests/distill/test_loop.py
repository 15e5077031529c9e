"""The training loop against plain loops, written out from the formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from kdx.data.dataset import open_data
from kdx.distill import EpochResult, TrainingSettings, loop
from kdx.distill.augmentation import Augmentation
from kdx.distill.checkpoints import Recipe
from kdx.distill.data import SplitImages
from kdx.distill.optimization import learning_rate
from kdx.distill.processes import Processes
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from tests.distill.small import GradientTimes, Interruption

CPU = torch.device("cpu")
COUNT = 60
PLAIN = TrainingSettings(epochs=3, batch=16, learning_rate=0.05)


def network(seed: int = 0) -> nn.Sequential:
    """Without batch normalisation, so that the parts of a batch do not depend on one another."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 10))


@pytest.fixture(scope="module")
def images() -> SplitImages:
    return SplitImages(open_data("digits"), np.arange(COUNT), (8, 8), 0.01)


def training(images: SplitImages, settings: TrainingSettings, module: nn.Module | None = None, **options: Any) -> loop.Training:
    graph = FeatureGraph(module or network(), [])

    def loss(pixels: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
        return {"labels": functional.cross_entropy(graph(pixels)[0], labels, label_smoothing=settings.label_smoothing)}

    parts: dict[str, Any] = {"images": images, "validation": images, "epochs": settings.epochs, "recipe": Recipe({})} | options
    return loop.Training("base", graph, loss, settings=settings, device=CPU, augmentation=Augmentation(settings, (8, 8), 10), **parts)


def trained(images: SplitImages, settings: TrainingSettings, folder: Path) -> tuple[dict[str, Tensor], list[EpochResult]]:
    results: list[EpochResult] = []
    loop.train(training(images, settings), folder, results.append)
    return load_file(folder / "base.safetensors"), results


def epochs_of_batches(settings: TrainingSettings) -> list[tuple[int, list[Any], np.random.Generator]]:
    epochs = []
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([settings.seed, epoch])
        epochs.append((epoch, np.array_split(generator.permutation(COUNT), math.ceil(COUNT / settings.batch)), generator))
    return epochs


def test_the_default_training_is_the_plain_loop(images: SplitImages, tmp_path: Path) -> None:
    settings = replace(PLAIN, augment=True, flip=True, select="last")
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    assert images.pixels is not None
    step, means = 0, []
    for _, batches, generator in epochs_of_batches(settings):
        losses = 0.0
        for batch in batches:
            pixels = images.pixels[torch.from_numpy(batch)].float() / 255
            padded = functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
            tops, lefts = generator.integers(0, 3, (2, len(batch)))
            pixels = torch.stack([padded[i, :, t : t + 8, u : u + 8] for i, (t, u) in enumerate(zip(tops, lefts, strict=True))])
            mirrored = generator.random(len(batch)) < 0.5
            pixels = torch.stack([image.flip(2) if flip else image for image, flip in zip(pixels, mirrored, strict=True)])
            step += 1
            done = step / 12
            factor = done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2
            optimizer.param_groups[0]["lr"] = 0.05 * factor
            loss = functional.cross_entropy(module(pixels), torch.from_numpy(images.dataset.labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += float(loss.detach()) * len(batch) / COUNT
        means.append(losses)
    weights, results = trained(images, settings, tmp_path)
    for name, tensor in module.state_dict().items():  # equal up to the rounding of convolutions of other memory layouts
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)
    assert [result.loss for result in results] == pytest.approx(means)


def test_every_option_of_the_optimizer_follows_its_formula(images: SplitImages, tmp_path: Path) -> None:
    """AdamW by a step schedule, clipped, smoothed, accumulated over three parts, with an average of the weights."""
    settings = replace(
        PLAIN, optimizer="adamw", learning_rate=0.01, weight_decay=0.1, schedule="step", milestones=(1, 2), gamma=0.3, warm_up=0.2,
        label_smoothing=0.2, clip=0.5, accumulate=3, ema=0.8, select="last",
    )  # fmt: skip
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.1)
    average: dict[str, Tensor] = {}
    assert images.pixels is not None
    step, clipped = 0, 0
    for epoch, batches, _ in epochs_of_batches(settings):
        for batch in batches:
            step += 1
            rate = 0.01 * step / 12 / 0.2 if step / 12 < 0.2 else 0.01 * 0.3**epoch
            optimizer.param_groups[0]["lr"] = rate
            logs = functional.log_softmax(module(images.pixels[torch.from_numpy(batch)].float() / 255), 1)
            hard = -logs[torch.arange(len(batch)), torch.from_numpy(images.dataset.labels[batch])].mean()
            optimizer.zero_grad()
            (0.8 * hard - 0.2 * logs.mean()).backward()
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            norm = torch.sqrt(sum((gradient.square().sum() for gradient in gradients), torch.zeros(())))
            if norm > 0.5:
                clipped += 1
                for gradient in gradients:
                    gradient.mul_(0.5 / norm)
            optimizer.step()
            for name, tensor in module.state_dict().items():
                average[name] = 0.8 * average[name] + 0.2 * tensor if name in average else tensor.clone()
    assert 0 < clipped < step
    weights, _ = trained(images, settings, tmp_path)
    for name, tensor in average.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("select", ["accuracy", "loss", "last"])
def test_the_selected_epoch_is_kept_and_patience_stops(images: SplitImages, tmp_path: Path, select: Any) -> None:
    settings = replace(PLAIN, epochs=12, learning_rate=0.9, schedule="constant", warm_up=0, select=select)
    weights, results = trained(images, settings, tmp_path / "all")
    all_scores: dict[str, list[tuple[float, ...]]] = {
        "accuracy": [(result.accuracy or 0, -(result.entropy or 0)) for result in results],
        "loss": [(-(result.entropy or 0),) for result in results],
        "last": [(result.epoch,) for result in results],
    }
    scores = all_scores[select]
    best = max(range(12), key=scores.__getitem__)
    module = network()
    module.load_state_dict(weights)
    assert loop.evaluate(FeatureGraph(module, []), images, CPU) == pytest.approx((results[best].accuracy, results[best].entropy))
    if select != "last":
        best, end = 0, 0
        while end - best < 2:
            end += 1
            best = end if scores[end] >= scores[best] else best
        _, stopped = trained(images, replace(settings, patience=2), tmp_path / "some")
        assert [result.epochs for result in stopped] == [12] * end + [end + 1] and end < 11
        assert [result.accuracy for result in stopped] == [result.accuracy for result in results[: end + 1]]


def test_an_average_of_the_weights_includes_the_statistics_of_batch_normalisation(images: SplitImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    normalisation = nn.BatchNorm2d(4)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), normalisation, nn.Flatten(), nn.Linear(36, 10))
    settings = replace(PLAIN, ema=0.9, select="last")
    results: list[EpochResult] = []
    loop.train(training(images, settings, module), tmp_path, results.append)
    average = load_file(tmp_path / "base.safetensors")
    live = normalisation.state_dict()["running_mean"]
    assert not torch.equal(average["1.running_mean"], live) and average["1.running_mean"].abs().sum() > 0
    module.load_state_dict(average)
    assert loop.evaluate(FeatureGraph(module, []), images, CPU) == pytest.approx((results[-1].accuracy, results[-1].entropy))


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        (replace(PLAIN, schedule="constant", warm_up=0), {1: 1.0, 50: 1.0, 100: 1.0}),
        (replace(PLAIN, schedule="step", warm_up=0), {1: 1.0, 50: 1.0, 51: 0.1, 75: 0.1, 76: 0.01, 100: 0.01}),
        (replace(PLAIN, schedule="step", milestones=(3,), gamma=0.5, warm_up=0.1), {5: 0.5, 10: 1.0, 30: 1.0, 31: 0.5}),
        (replace(PLAIN, warm_up=0.5), {25: 0.5, 50: 1.0, 75: 0.5, 100: 0.0}),
    ],
)
def test_learning_rates(settings: TrainingSettings, factors: dict[int, float]) -> None:
    """Ten epochs of ten steps."""
    rates = {step: learning_rate(settings, step, 100, (step - 1) // 10, 10) / settings.learning_rate for step in factors}
    if settings.schedule == "step" and not settings.milestones:  # after 5 and 7 of 10 epochs
        rates |= {75: learning_rate(settings, 70, 100, 6, 10) / 0.05, 76: learning_rate(settings, 71, 100, 7, 10) / 0.05}
    assert rates == pytest.approx(factors)


def test_a_loss_that_is_not_finite_stops_at_its_step(images: SplitImages, tmp_path: Path) -> None:
    module = network()
    graph = FeatureGraph(module, [])
    steps = []

    def loss(pixels: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
        steps.append(len(labels))
        return {"labels": functional.cross_entropy(graph(pixels)[0], labels) * (math.nan if len(steps) == 7 else 1)}

    bad = replace(training(images, PLAIN, module), graph=graph, loss=loss)
    with pytest.raises(KdxError, match=r"base diverged in epoch 2 at step 3: its loss is nan.*\n.*weights of epoch 1") as error:
        loop.train(bad, tmp_path, lambda result: None)
    assert "lower learning rate" in error.value.hint
    assert all(torch.isfinite(tensor).all() for tensor in torch.load(tmp_path / "base.state.pt")["best"].values())


def test_a_training_that_stops_within_an_epoch_goes_on_as_if_it_had_not(images: SplitImages, tmp_path: Path) -> None:
    """With dropout, an adapter beside the network, momentum, an average of the weights, and shifted images."""
    settings = replace(PLAIN, augment=True, flip=True, ema=0.8, accumulate=2, save_minutes=0)

    def fresh(stop_after: int) -> loop.Training:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(36, 10))
        graph, adapter, calls = FeatureGraph(module, []), nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)), []

        def loss(pixels: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
            calls.append(len(labels))
            if len(calls) > stop_after:
                raise Interruption
            logits = graph(pixels)[0]
            return {"labels": functional.cross_entropy(logits, labels), "adapted": functional.cross_entropy(adapter(logits), labels)}

        return replace(training(images, settings, module), graph=graph, loss=loss, objective=adapter)

    whole: list[EpochResult] = []
    resumed: list[EpochResult] = []
    loop.train(fresh(1000), tmp_path / "whole", whole.append)
    for stop_after in (5, 8, 1):  # calls; every step has two
        with pytest.raises(Interruption):
            loop.train(fresh(stop_after), tmp_path / "parts", resumed.append)
    assert torch.load(tmp_path / "parts" / "base.state.pt", weights_only=True)["step"] == 2
    loop.train(fresh(1000), tmp_path / "parts", resumed.append)
    assert (tmp_path / "parts" / "base.safetensors").read_bytes() == (tmp_path / "whole" / "base.safetensors").read_bytes()
    for one, two in zip(whole, resumed, strict=True):
        assert (one.loss, one.parts, one.accuracy, one.entropy) == (two.loss, two.parts, two.accuracy, two.entropy)


@pytest.mark.parametrize("overflows", [1, 1000])
def test_float16_leaves_out_a_step_that_overflows_and_stops_if_all_do(images: SplitImages, tmp_path: Path, overflows: int) -> None:
    settings = replace(PLAIN, epochs=12, precision="float16", learning_rate=0.01)
    graph, steps = FeatureGraph(network(), []), []

    def loss(pixels: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
        steps.append(len(labels))
        logits = graph(pixels)[0]
        if len(steps) <= overflows:
            logits = GradientTimes.apply(logits, math.inf)  # type: ignore[no-untyped-call]
        return {"labels": functional.cross_entropy(logits, labels)}

    run = replace(training(images, settings, graph.network), graph=graph, loss=loss)
    if overflows == 1:
        loop.train(run, tmp_path, lambda result: None)
        assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "base.safetensors").values())
        return
    with pytest.raises(KdxError, match=r"base diverged in epoch \d+ at step \d: its gradient is nan"):
        loop.train(run, tmp_path, lambda result: None)
    assert len(steps) == 41  # the scale begins at 2^16


class OneOfTwo(Processes):
    """The first of two processes, of which the other's loss is not finite from step 2 on."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 2] if isinstance(value, int) else [value]


def test_all_processes_stop_when_the_loss_of_one_diverges(images: SplitImages, tmp_path: Path) -> None:
    """Otherwise the others would wait for it."""
    with pytest.raises(KdxError, match="base diverged in epoch 1 at step 2: its loss is"):
        loop.train(training(images, PLAIN, processes=OneOfTwo()), tmp_path, lambda _result: None)
