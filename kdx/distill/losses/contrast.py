"""Contrastive representation distillation, with a bank of embeddings of all training images."""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdx.distill.losses.adapters import embedding
from kdx.distill.losses.base import Batch, DistillationLoss, LossSettings, Requirements, Shapes
from kdx.distill.losses.logits import single_classes
from kdx.errors import KdxError


def contrast(positive: Tensor, negative: Tensor, log_normaliser: Tensor, images: int) -> Tensor:
    """Noise-contrastive estimation of one direction: mean over anchors of -log h(positive) - sum_k log(1 - h(negative_k)).

        h(u) = p(u) / (p(u) + N / M),   p(u) = exp(u) / Z

    positive: the similarity u = <a, b> / tau of each anchor [n] with the other network's embedding of the same image. negative: [n, N],
    with embeddings of images of other classes. log_normaliser: log Z. images: M, the number of training images. The loss is positive.

    Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699. The paper's equation omits the
    normalising constant Z, which the authors' code estimates from the first batch.
    """
    shift = log_normaliser + math.log(negative.shape[1] / images)
    return (functional.softplus(shift - positive) + functional.softplus(negative - shift).sum(1)).mean()


class Contrast(DistillationLoss):
    """`contrast` in both directions: the student's embedding with the teacher's bank, and the teacher's with the student's.

    An embedding is the mean feature of the last pair after a linear layer, scaled to norm 1. A bank contains an embedding of each training
    image; after each batch, its entries become m entry + (1 - m) embedding, scaled to norm 1. Weight 0.8.

    Options: ``negatives`` per image (at most the images of other classes), ``width`` of the embeddings, ``tau`` and ``momentum`` m.
    Memory: two banks of images x width numbers, which are part of the state that a training resumes from.
    """

    requirements = Requirements(pairs="last", adapters=True, memory=True, classes=True)
    option_ranges = MappingProxyType({"negatives": (1, math.inf), "width": (1, math.inf), "tau": (1e-3, math.inf), "momentum": (0, 1)})

    def __init__(
        self,
        shapes: Shapes,
        settings: LossSettings,
        *,
        negatives: int = 16384,
        width: int = 128,
        tau: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__(shapes, settings)
        self.weight = 0.8
        self.tau, self.momentum = tau, momentum
        self.embed = nn.ModuleDict({role: nn.Linear(shape[-1][0], width) for role, shape in vars(shapes).items() if role in _ROLES})
        counts = torch.bincount(shapes.labels, minlength=shapes.classes)
        self.images = len(shapes.labels)
        self.negatives = min(negatives, self.images - int(counts.max()))
        if not self.negatives:
            raise KdxError(
                "The method crd compares images of different classes, and all training images have the same class.",
                "Give training images of two classes or more.",
            )
        for role in _ROLES:
            self.register_buffer(f"bank_{role}", functional.normalize(torch.randn(self.images, width)))
            self.register_buffer(f"log_normaliser_{role}", torch.tensor(math.nan))
        # Images in the order of their classes, where each class begins, and its size: to sample images of other classes.
        self.register_buffer("by_class", shapes.labels.argsort(stable=True), persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        classes = single_classes(batch, "crd")
        if batch.indices is None:
            raise ValueError("crd needs the indices of the images")
        negatives = self._sampled(classes)
        embeddings = {
            role: functional.normalize(self.embed[role](embedding(outputs.features[-1])))
            for role, outputs in (("student", batch.student), ("teacher", batch.teacher))
        }
        losses = [
            self._direction(embeddings["student"], "teacher", batch.indices, negatives),
            self._direction(embeddings["teacher"], "student", batch.indices, negatives),
        ]
        if self.training:
            self._remember(embeddings, batch.indices)
        return losses[0] + losses[1]

    def _sampled(self, classes: Tensor) -> Tensor:
        """Indices [n, N] of random images of other classes, with replacement."""
        counts, starts = (self.get_buffer(name)[classes][:, None] for name in ("counts", "starts"))
        share = torch.rand(len(classes), self.negatives, dtype=torch.float64, device=classes.device)
        positions = (share * (self.images - counts)).long()
        chosen: Tensor = self.get_buffer("by_class")[torch.where(positions < starts, positions, positions + counts)]
        return chosen

    def _direction(self, anchors: Tensor, role: str, indices: Tensor, negatives: Tensor) -> Tensor:
        """The loss of anchors with the bank of a role."""
        bank = self.get_buffer(f"bank_{role}").clone()  # it changes before the backward pass
        similarities = anchors @ bank.to(anchors.dtype).T / self.tau  # fewer products than with a copy of the bank per anchor
        positive, negative = similarities.gather(1, indices[:, None])[:, 0], similarities.gather(1, negatives)
        log_normaliser = self.get_buffer(f"log_normaliser_{role}")
        if torch.isnan(log_normaliser):
            observed = torch.cat([positive[:, None], negative], 1).detach().flatten()
            log_normaliser.copy_(observed.logsumexp(0) - math.log(len(observed)) + math.log(self.images))
        return contrast(positive, negative, log_normaliser, self.images)

    @torch.no_grad()
    def _remember(self, embeddings: dict[str, Tensor], indices: Tensor) -> None:
        for role in _ROLES:
            bank = self.get_buffer(f"bank_{role}")
            mixed = self.momentum * bank[indices] + (1 - self.momentum) * embeddings[role].to(bank.dtype)
            bank[indices] = functional.normalize(mixed)


_ROLES = ("student", "teacher")
