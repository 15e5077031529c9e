"""The formulas of the losses in NumPy, written out slowly from the papers: loops over images, classes and channels, float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    probabilities: Array = np.exp(logits) / np.exp(logits).sum()
    return probabilities


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum())


def standardised_kd(student: Array, teacher: Array, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        zs, zt = (s - s.mean()) / s.std(), (t - t.mean()) / t.std()
        total += kl(softmax(zt / temperature), softmax(zs / temperature))
    return temperature**2 * total / len(student)


def decoupled_kd(student: Array, teacher: Array, classes: list[int], temperature: float, alpha: float, beta: float) -> float:
    total = 0.0
    for s, t, c in zip(student, teacher, classes, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        binary_q, binary_p = np.array([q[c], 1 - q[c]]), np.array([p[c], 1 - p[c]])
        others_q, others_p = np.delete(q, c) / (1 - q[c]), np.delete(p, c) / (1 - p[c])
        total += alpha * kl(binary_p, binary_q) + beta * kl(others_p, others_q)
    return temperature**2 * total / len(student)


def dist(student: Array, teacher: Array, temperature: float, beta: float, gamma: float) -> float:
    q = np.array([softmax(row / temperature) for row in student])
    p = np.array([softmax(row / temperature) for row in teacher])
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (beta * inter + gamma * intra))


def hints(student: Array, teacher: Array) -> float:
    return float(np.mean([(s - t) ** 2 for s, t in zip(student.ravel(), teacher.ravel(), strict=True)]))


def partial_distance(student: Array, teacher: Array, margin: Array) -> float:
    total = 0.0
    for image, channel, y, x in np.ndindex(*student.shape):
        s, t = float(student[image, channel, y, x]), max(teacher[image, channel, y, x], margin[channel])
        if not s <= t <= 0:
            total += float(s - t) ** 2
    return float(total / len(student))


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def relational_distance(student: Array, teacher: Array) -> float:
    pairs = list(itertools.permutations(range(len(student)), 2))
    relative = []
    for x in (student, teacher):
        distances = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        relative.append(distances / distances.mean())
    return float(np.mean([huber(s - t) for s, t in zip(*relative, strict=True)]))


def relational_angle(student: Array, teacher: Array) -> float:
    def cosine(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    triples = itertools.permutations(range(len(student)), 3)
    return float(np.mean([huber(cosine(student, *triple) - cosine(teacher, *triple)) for triple in triples]))


def contrast(positive: Array, negative: Array, normaliser: float, images: int) -> float:
    total, noise = 0.0, negative.shape[1] / images
    for anchor, others in zip(positive, negative, strict=True):
        p = math.exp(anchor) / normaliser
        total -= math.log(p / (p + noise))
        for other in others:
            p = math.exp(other) / normaliser
            total -= math.log(1 - p / (p + noise))
    return total / len(positive)


def pooled(maps: Array, cells: int) -> Array:
    """Averages over a grid of cells, which the resolution must be a multiple of."""
    n, channels, height, width = maps.shape
    averages: Array = maps.reshape(n, channels, cells, height // cells, cells, width // cells).mean((3, 5))
    return averages


def hierarchical_context(student: Array, teacher: Array, levels: tuple[int, ...]) -> float:
    loss, total = float(((student - teacher) ** 2).mean()), 1.0
    for k, level in enumerate(levels, 1):
        loss += 2.0**-k * float(((pooled(student, level) - pooled(teacher, level)) ** 2).mean())
        total += 2.0**-k
    return loss / total


def class_attention(student: Array, teacher: Array, cells: int, normalise: bool) -> float:
    total, count = 0.0, 0
    for s, t in zip(pooled(student, cells), pooled(teacher, cells), strict=True):
        for class_s, class_t in zip(s, t, strict=True):
            if normalise:
                class_s, class_t = class_s / np.sqrt((class_s**2).sum()), class_t / np.sqrt((class_t**2).sum())
            total, count = total + float(((class_s - class_t) ** 2).sum()), count + class_s.size
    return total / count
