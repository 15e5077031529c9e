"""The scores of a run in plain words: which differences they support, which they do not settle, and what they cannot show."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kdx.report.headline import headline
from kdx.roles import BALANCE, CONTRASTS, EXCESS, GAIN, LEAD, LIKENESS, MAPS, ROLES, MapKind, counterpart
from kdx.runs.measured import Entry
from kdx.runs.number_text import number as number
from kdx.runs.record import RunRecord
from kdx.runs.split import training_warning
from kdx.runs.target_names import target_noun
from kdx.scores.uncertainty import sign_test

FEW_IMAGES = 64
"""With fewer images than this, the page warns that the intervals are wide."""

_DIFFERENCE_INTERVAL = "interval of the difference"

_LIKENESS_SCORES, _BALANCE_SCORES, *_ = CONTRASTS


@dataclass(frozen=True)
class Figure:
    """A number beside a statement, as text. ``interval`` and ``p`` are empty where the number does not have them."""

    name: str
    value: str
    interval: str = ""
    p: str = ""


@dataclass(frozen=True)
class Statement:
    """A sentence about the scores, with the numbers it is based on. ``settled``: whether it states a direction."""

    topic: str
    verdict: str
    figures: tuple[Figure, ...]
    settled: bool

    @property
    def text(self) -> str:
        """Words and numbers in one line."""
        numbers = (" ".join(part for part in (f.name, f.value, f"({f.interval})" if f.interval else "", f.p) if part) for f in self.figures)
        return f"{self.verdict} {'; '.join(numbers)}".strip()


@dataclass(frozen=True)
class LayerReading:
    """The statements about one layer."""

    layer: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Reading:
    """The statements about a run: a headline, the accuracies, each layer, and what a reader must not conclude."""

    headline: str
    accuracy: tuple[Statement, ...]
    layers: tuple[LayerReading, ...]
    cautions: tuple[str, ...]


def span(entry: Entry, digits: int | None = None, sign: bool = False) -> tuple[str, str]:
    """Value and interval as text, such as ``("0.91", "0.89 to 0.93")``.

    Without ``digits`` there are two decimals, or up to four where a narrow interval would otherwise have equal bounds, or where a
    bound close to zero would otherwise be printed as zero.
    """
    if digits is None:
        low, high = entry.interval
        digits = 2
        while entry.known and digits < 4:
            if high - low >= 4 * 10**-digits and all(x == 0 or abs(x) >= 0.5 * 10**-digits for x in (low, high)):
                break
            digits += 1
    low_text, high_text = (number(x, digits) for x in entry.interval)
    return number(entry.value, digits, sign), f"{low_text} to {high_text}"


def probability(p: float) -> str:
    """A p-value with three decimals, or with two from 0.1 on; never printed as zero."""
    if p < 0.0005:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(x: float, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{number(100 * x, digits)}%"


def training_notice(run: RunRecord) -> str | None:
    """The notice near the top of the page of a run whose images were or may have been used in training; None where none of them was."""
    return training_warning(run.trained_on, run.explained)


def kept_pixels(keep: float, noise: float, of_class: str = "predicted", score: str = "logit", image: str = "exact") -> str:
    """How a salient image is made, as a clause."""
    with_noise = f" with noise of standard deviation {noise:g}" if noise else ""
    plain = (of_class, score) == ("predicted", "logit")
    ranking = "" if plain else f" of the {score} of the {of_class} class"
    authors = ", in the way and with the contrast of the authors’ code" if image == "published" else ""
    return f"the top {100 * keep:.4g}% of pixels by HiResCAM{ranking} are kept and the rest are imputed{with_noise}{authors}"


def ranking_map(of_class: str, score: str, image: str) -> str:
    """Which HiResCAM map ranks the pixels of a salient image, as a sentence."""
    layer = "the last of the explained layers" if image == "published" else "the same layer"
    explained = "true class" if of_class == "true" else "class that it predicts"
    return f"The HiResCAM map is the network’s own map at {layer}, for the {score} of the {explained}."


def of_target(text: str, target: str) -> str:
    """A sentence of the page about relevance, for a run whose target, by its name, is another than labels."""
    return text.replace("the labels", target_noun(target))


def read(
    layers: Mapping[str, tuple[str, Mapping[str, Entry], Mapping[str, Entry]]],
    accuracy: Mapping[str, Entry],
    discordant: tuple[int, int] | None,
    confidence: float,
    salient: str = "",
) -> Reading:
    """The scores of one run in plain words.

    layers: each student layer -> (teacher layer, scores, contrasts). accuracy: role -> accuracy. discordant: the number of images that
    only the student, and that only its counterpart (`kdx.roles.counterpart`), classifies correctly; None for a student alone. salient: how
    salient images are made (`kept_pixels`) where the scores describe them, else empty.

    The statements are those whose scores and contrasts exist. A statement has a direction only where `Entry.direction` has one. Every
    other statement is that these images do not settle the question. No sentence claims a cause.
    """
    scores_of_layers = [scores for _, scores, _ in layers.values()]
    entries = [entry for scores in scores_of_layers for entry in scores.values()]
    images = [entry.n for entry in entries if entry.n is not None]
    adjusted = any(entry.p_adjusted != entry.p_value for entry in entries)  # runs of kdx 0.1.0 have p-values of single scores
    return Reading(
        headline({name: {**scores, **contrasts} for name, (_, scores, contrasts) in layers.items()}, confidence),
        _accuracy(accuracy, discordant, confidence),
        tuple(LayerReading(name, _layer(name, *rest, confidence)) for name, rest in layers.items()),
        _cautions(
            min(images, default=None),
            len(layers),
            max(map(len, scores_of_layers)),
            adjusted,
            accuracy,
            any("FSS(R,T)" in scores for scores in scores_of_layers),
            salient,
        ),
    )


def _accuracy(accuracy: Mapping[str, Entry], discordant: tuple[int, int] | None, confidence: float) -> tuple[Statement, ...]:
    figures = [
        Figure(role, percent(accuracy[role].value), " to ".join(map(percent, accuracy[role].interval)))
        for role in ROLES
        if role in accuracy
    ]
    other = counterpart(accuracy)
    if other is None or discordant is None:
        return (Statement("Accuracy", "The student is compared with no other network.", tuple(figures), False),)
    gained, lost = discordant
    if gained + lost == 0:
        verdict = (
            f"The student and the {other} are right and wrong on the same images, so these images do not settle which is more accurate."
        )
        return (Statement("Accuracy", verdict, tuple(figures), False),)
    p = sign_test(gained, lost)
    figures.append(Figure("exact sign test", "", "", probability(p)))
    split = f"only the student is right on {_images(gained)}, only the {other} on {lost:,}"
    settled = p <= 1 - confidence + 1e-12
    if settled:
        better, worse = ("student", other) if gained > lost else (other, "student")
        verdict = f"On images like these the {better} is more accurate than the {worse}: {split}."
    else:
        verdict = f"These images do not settle whether the student or the {other} is more accurate: {split}."
    return (Statement("Accuracy", verdict, tuple(figures), settled),)


def _layer(
    layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrasts: Mapping[str, Entry], confidence: float
) -> tuple[Statement, ...]:
    """The statements about a layer. The statement about a contrast is next to those about its two scores."""
    likeness = [_likeness(layer, teacher_layer, scores, contrasts[LIKENESS], confidence)] if LIKENESS in contrasts else []
    if not likeness and "FSS(S,T)" in scores:
        likeness = [_alike(layer, teacher_layer, scores["FSS(S,T)"], confidence)]
    if EXCESS in contrasts:
        likeness.append(_excess(layer, teacher_layer, scores["FSS(R,T)"], contrasts[EXCESS], confidence))
    present = [kind for kind in MAPS.values() if kind.score in scores and kind.given is not None]
    compared = [_beyond(kind, scores, confidence) for kind in present if kind.score in _BALANCE_SCORES]
    others = [_beyond(kind, scores, confidence) for kind in present if kind.score not in _BALANCE_SCORES]
    gains = [_gain(contrasts[name], other, confidence) for name, other in ((GAIN, "base"), (LEAD, "teacher")) if name in contrasts]
    balance = [_balance(contrasts[BALANCE], confidence)] if BALANCE in contrasts else []
    alone = [] if present else [_relevance(layer, scores["RS(S)"], confidence)]
    return (*likeness, *alone, *gains, *compared, *balance, *others)


def _alike(layer: str, teacher_layer: str, entry: Entry, confidence: float) -> Statement:
    """The statement about FSS(S,T) where there is no base to compare it with."""
    figures = (_figure("FSS(S,T)", entry),)
    if not entry.known:
        return Statement("Similarity", f"The similarity of the features at {layer} to the teacher’s could not be computed.", figures, False)
    settled = entry.direction(confidence) > 0
    start = "The student’s features" if settled else "These images do not settle whether the student’s features"
    verdict = f"{start} at {layer} are like {_theirs(layer, teacher_layer)}. {_why(entry, confidence)}"
    return Statement("Similarity", verdict, figures, settled)


def _excess(layer: str, teacher_layer: str, baseline: Entry, contrast: Entry, confidence: float) -> Statement:
    """The statement about FSS(S,T) beside that of random weights."""
    figures = (_figure("FSS(R,T)", baseline), _figure("difference", contrast, sign=True))
    if not (baseline.known and contrast.known):
        return Statement("Baseline", "The similarity of random weights to the teacher could not be computed.", figures, False)
    settled = contrast.direction(confidence)
    relation = {1: "are closer to", -1: "are further from", 0: "may or may not be closer to"}[settled]
    verdict = (
        f"The student’s features at {layer} {relation} {_theirs(layer, teacher_layer)} than those of its architecture with random weights. "
        f"{_why(contrast, confidence, _DIFFERENCE_INTERVAL)}"
    )
    return Statement("Baseline", verdict, figures, settled != 0)


def _relevance(layer: str, entry: Entry, confidence: float) -> Statement:
    """The statement about a student alone."""
    figures = (_figure("RS(S)", entry),)
    if not entry.known:
        return Statement("Relevance", "RS(S) could not be computed from these images.", figures, False)
    settled = entry.direction(confidence) > 0
    start = "The student’s features" if settled else "These images do not settle whether the student’s features"
    return Statement("Relevance", f"{start} at {layer} are related to the labels. {_why(entry, confidence)}", figures, settled)


def _theirs(layer: str, teacher_layer: str) -> str:
    return "the teacher’s" if layer == teacher_layer else f"the teacher’s at {teacher_layer}"


def _likeness(layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrast: Entry, confidence: float) -> Statement:
    student, base = (scores[name] for name in _LIKENESS_SCORES)
    figures = (*(_figure(name, scores[name]) for name in _LIKENESS_SCORES), _figure("difference", contrast, sign=True))
    if not (student.known and base.known and contrast.known):
        return Statement("Similarity", f"The similarity of the features at {layer} to the teacher’s could not be computed.", figures, False)
    theirs = _theirs(layer, teacher_layer)
    settled = contrast.direction(confidence) != 0
    if settled:
        relation = "closer to" if contrast.sign > 0 else "further from"
        verdict = f"The student’s features at {layer} are {relation} {theirs} than the base’s are."
    else:
        verdict = f"These images do not settle whether the student’s or the base’s features at {layer} are closer to {theirs}."
    verdict = f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}"
    unsettled = [f"the {role}’s" for role, entry in (("student", student), ("base", base)) if not entry.settled(confidence)]
    if unsettled:
        verdict += f" These images do not settle whether {' and '.join(unsettled)} features are like the teacher’s at all."
    return Statement("Similarity", verdict, figures, settled)


def _beyond(kind: MapKind, scores: Mapping[str, Entry], confidence: float) -> Statement:
    topic, explained, given = kind.name.capitalize(), kind.explained, kind.given
    entry = scores[kind.score]
    figures = (_figure(kind.score, entry),)
    if not entry.known:
        return Statement(topic, f"{kind.score} could not be computed from these images.", figures, False)
    settled = entry.direction(confidence)
    if not settled:
        verdict = (
            f"These images do not settle whether the {explained}’s features are relevant to the labels beyond the {given}’s. "
            f"{_why(entry, confidence)}"
        )
    elif settled > 0:
        verdict = f"The {explained}’s features are relevant to the labels beyond the {given}’s. {_why(entry, confidence)}"
    else:
        level = percent(confidence, 0)
        verdict = (
            f"The {explained} falls short of the {given}: the part of the {explained}’s features that the {given}’s do not explain is "
            f"negatively related to the labels. The {level} interval lies below zero."
        )
    return Statement(topic, verdict, figures, settled != 0)


def _gain(contrast: Entry, other: str, confidence: float) -> Statement:
    """The statement about the difference of the student's relevance and that of another role."""
    topic, figures = {"base": "Gain", "teacher": "Lead"}[other], (_figure("difference", contrast, sign=True),)
    if not contrast.known:
        verdict = f"The difference between RS(S) and RS({other[0].upper()}) could not be computed from these images."
        return Statement(topic, verdict, figures, False)
    settled = contrast.direction(confidence)
    if settled:
        more, less = ("student", other) if settled > 0 else (other, "student")
        verdict = f"The {more}’s features are more relevant to the labels than the {less}’s."
    else:
        verdict = f"These images do not settle whether the student’s or the {other}’s features are more relevant to the labels."
    return Statement(topic, f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}", figures, settled != 0)


def _balance(contrast: Entry, confidence: float) -> Statement:
    figures = (_figure("difference", contrast, sign=True),)
    if not contrast.known:
        verdict = f"The difference between {' and '.join(_BALANCE_SCORES)} could not be computed from these images."
        return Statement("Balance", verdict, figures, False)
    settled = contrast.direction(confidence) != 0
    if settled:
        more, less = ("student", "base") if contrast.sign > 0 else ("base", "student")
        verdict = f"What the {more} has beyond the {less} is more relevant to the labels than what the {less} has beyond the {more}."
    else:
        verdict = "These images do not settle whether the student or the base is more relevant to the labels beyond the other."
    verdict = f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}"
    return Statement("Balance", verdict, figures, settled)


def _figure(name: str, entry: Entry, sign: bool = False) -> Figure:
    return Figure(name, *span(entry, sign=sign), "" if entry.p_value is None else probability(entry.p_value))


def _why(entry: Entry, confidence: float, interval: str = "interval") -> str:
    """The reason why a statement has a direction or not."""
    subject = f"The {percent(confidence, 0)} {interval}"
    if entry.sign == 0:
        return f"{subject} includes zero."
    if not entry.settled(confidence):
        return f"{subject} excludes zero, but the permutation test is not significant."
    return f"{subject} excludes zero."


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _cautions(
    images: int | None, layers: int, scores: int, adjusted: bool, roles: Collection[str], baseline: bool, salient: str
) -> tuple[str, ...]:
    cautions = []
    if salient:
        cautions.append(
            f"The scores describe salient features: for each image, network and layer, {salient}. They do not describe the other "
            "pixels. The maps describe the whole images."
        )
    if images is not None and images < FEW_IMAGES:
        cautions.append(
            f"The scores are based on {_images(images)}. Intervals from so few images are wide, and their width is itself uncertain. "
            "More images would narrow them."
        )
    if "teacher" in roles and not baseline:
        cautions.append(
            "FSS has no baseline here. Networks with random weights can have a high FSS too, because images differ in the same simple ways "
            "for all of them. kdx explain --random-baseline computes it."
        )
    where = f"over {layers} {'layer' if layers == 1 else 'layers'} with {scores} {'score' if scores == 1 else 'scores'} each"
    several = layers * scores > 1
    if several and adjusted:
        cautions.append(
            f"Each interval refers to one score alone: {where}, some can exclude zero by chance. The p-values behind the statements are "
            "adjusted for the number of layers, not for that of scores."
        )
    elif several:
        cautions.append(f"Each interval and p-value refers to one score alone: {where}, some can exclude zero or be significant by chance.")
    cautions.append(_CAUTIONS["teacher" in roles, "base" in roles])
    return tuple(cautions)


_CAUTIONS = {
    (True, True): "The numbers describe one teacher, one base and one student on these images. A base and a student also differ because "
    "training is random, so a difference here does not show, by itself, that the teacher caused it.",
    (
        False,
        True,
    ): "The numbers describe one base and one student on these images. Any two networks differ because training is random, so a "
    "difference here does not show, by itself, what caused it.",
    (
        True,
        False,
    ): "The numbers describe one teacher and one student on these images. Both learned the same task, so what they share may come "
    "from the task instead of the teacher. A base, the student’s architecture trained without the teacher, would tell the two apart.",
    (False, False): "The numbers describe one network on these images. They show how its features follow the labels, not what it learned "
    "from another network.",
}
"""What the numbers cannot show, by whether there is a teacher and whether there is a base."""
