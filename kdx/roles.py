"""Roles, maps, scores and contrasts: their names and what they mean.

This is the only place that defines them. A computation has a student, and it may have a base and a teacher. Its maps, scores and contrasts
are those that name no other role. A student alone has the map that is given nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

TARGET = "target"
"""The name of the target's matrix beside the matrices of the roles."""

ROLES = ("teacher", "student", "base")
"""The roles that have maps and relevance."""

BASELINE = "random"
"""The role of a network with the student's architecture and random weights. Only its FSS is computed, beside which FSS(S,T) is read."""

MEASURED = (*ROLES, BASELINE)
"""The order of every stack of matrices. The target's matrix comes last."""

READING_ORDER = ("teacher", "base", "student")
"""The order in which a reader meets the roles: in tables, in records and in a models file."""

LETTERS = {role: role[0].upper() for role in MEASURED}


def possessive(network: str) -> str:
    """The possessive at the start of a sentence: "The student's" for a role, "A's" for a network with another name."""
    return f"The {network}'s" if network in MEASURED else f"{network}'s"


@dataclass(frozen=True)
class MapKind:
    """A kind of map: UniCAM of the explained role's features given the other role's features, or given nothing (None)."""

    name: str
    explained: str
    given: str | None
    meaning: str

    @property
    def symbol(self) -> str:
        return LETTERS[self.explained] + ("" if self.given is None else f" | {LETTERS[self.given]}")

    @property
    def score(self) -> str:
        """The name of the score of the same roles."""
        return f"RS({self.symbol.replace(' ', '')})"


MAPS: dict[str, MapKind] = {
    kind.name: kind
    for kind in (
        MapKind("distilled", "student", "base", "What the student has and the base does not."),
        MapKind("residual", "base", "student", "What the base has and the student does not."),
        MapKind("missed", "teacher", "student", "What the teacher has and the student does not."),
        MapKind("new", "student", "teacher", "What the student has and the teacher does not."),
        MapKind("alone", "student", None, "What is relevant in the student's features, given no other network."),
    )
}


StatisticName = Literal["correlation", "semipartial"]


@dataclass(frozen=True)
class Definition:
    """How a score is computed: a statistic of the named matrices (roles, or TARGET).

    permuted: the matrix whose images are permuted for the p-value. It is the target, or the teacher where there is no target.
    label: the score in words.
    """

    statistic: StatisticName
    matrices: tuple[str, ...]
    permuted: str
    label: str


SIMILARITY: dict[str, Definition] = {
    f"FSS({LETTERS[role]},T)": Definition("correlation", (role, "teacher"), "teacher", f"{name} and teacher")
    for role, name in (("student", "student"), ("base", "base"), (BASELINE, "random weights"))
}
RELEVANCE: dict[str, Definition] = {f"RS({LETTERS[role]})": Definition("correlation", (role, TARGET), TARGET, role) for role in ROLES}
CONDITIONAL: dict[str, Definition] = {
    kind.score: Definition(
        "semipartial", (kind.explained, TARGET, kind.given), TARGET, f"{kind.name}: {kind.explained} beyond {kind.given}"
    )
    for kind in MAPS.values()
    if kind.given is not None
}
SCORES: dict[str, Definition] = SIMILARITY | RELEVANCE | CONDITIONAL

CONTRASTS: tuple[tuple[str, str], ...] = (
    ("FSS(S,T)", "FSS(B,T)"),
    ("RS(S|B)", "RS(B|S)"),
    ("RS(S)", "RS(B)"),
    ("RS(S)", "RS(T)"),
    ("FSS(S,T)", "FSS(R,T)"),
)
"""Pairs of scores whose difference has an interval. The first three show an effect of distillation."""


def contrast_name(more: str, less: str) -> str:
    return f"{more} - {less}"


LIKENESS, BALANCE, GAIN, LEAD, EXCESS = (contrast_name(more, less) for more, less in CONTRASTS)
"""LIKENESS: is the student closer to the teacher than the base is? BALANCE: which of student and base is more relevant beyond the other?
GAIN: are the student's features more relevant than the base's? LEAD: are they more relevant than the teacher's? EXCESS: is the student
closer to the teacher than random weights of the same architecture are?"""


@dataclass(frozen=True)
class ScoreMap:
    """A kind of signed map that adds up to a score or a contrast: a difference of shares of its numerator (`kdx.decompose`).

    name: in files. score: the score or contrast that the maps add up to. symbol: the score as a map, with the role over whose positions
    it is distributed first. shares: (role, matrix) pairs: the role over whose positions, and the matrix with which, a share is computed.
    """

    name: str
    score: str
    symbol: str
    shares: tuple[tuple[str, str], ...]
    meaning: str


def _score_maps() -> Iterator[ScoreMap]:
    for role in ("student", "base", "teacher"):
        meaning = f"Where the {role}'s features are relevant to the target."
        yield ScoreMap(f"rs_{role}", f"RS({LETTERS[role]})", f"RS({LETTERS[role]})", ((role, TARGET),), meaning)
    for kind in MAPS.values():
        if kind.given is None:
            continue
        meaning = f"Where the {kind.explained} is relevant beyond the {kind.given} (positive), or falls short of it (negative)."
        shares = (kind.explained, TARGET), (kind.given, TARGET)
        yield ScoreMap(f"rs_{kind.explained}_given_{kind.given}", kind.score, kind.score, shares, meaning)
    for role, contrast in (("base", GAIN), ("teacher", LEAD)):
        meaning = f"Where the student is more relevant than the {role} (positive), or less (negative)."
        yield ScoreMap(f"rs_student_minus_{role}", contrast, contrast, (("student", TARGET), (role, TARGET)), meaning)
    for role in ("student", "base"):
        meaning = f"Where the {role} is like the teacher."
        yield ScoreMap(f"fss_{role}", f"FSS({LETTERS[role]},T)", f"FSS({LETTERS[role]},T)", ((role, "teacher"),), meaning)
    yield ScoreMap("fss_teacher", "FSS(S,T)", "FSS(T,S)", (("teacher", "student"),), "Where the teacher is like the student.")
    meaning = "Where the student is more like the teacher than the base is (positive), or less (negative)."
    yield ScoreMap("fss_student_minus_base", LIKENESS, LIKENESS, (("student", "teacher"), ("base", "teacher")), meaning)


SCORE_MAPS: dict[str, ScoreMap] = {kind.name: kind for kind in _score_maps()}


def roles_among(present: Collection[str]) -> tuple[str, ...]:
    """The roles present, in the order of MEASURED. Raises ValueError without a student, for the baseline without a teacher, and for any
    other name."""
    if not {"student"} <= set(present) <= set(MEASURED):
        raise ValueError(f"the roles are student and optionally base and teacher, not {', '.join(present) or 'none'}")
    if BASELINE in present and "teacher" not in present:
        raise ValueError("the random baseline is compared with a teacher, and there is none")
    return tuple(role for role in MEASURED if role in present)


def mapped_among(roles: Collection[str]) -> tuple[str, ...]:
    """The roles present that have maps: all except the baseline."""
    return tuple(role for role in roles_among(roles) if role != BASELINE)


def counterpart(roles: Collection[str]) -> str | None:
    """The role that the student is mainly compared with: the base, else the teacher. None for a student alone."""
    return next((role for role in ("base", "teacher") if role in roles), None)


def maps_among(roles: Collection[str]) -> dict[str, tuple[str, str | None]]:
    """The explained and the given role of each map that these roles make: every map of two of them, else the map given nothing."""
    pairs = pairs_among(roles)
    return dict(pairs) or {kind.name: (kind.explained, None) for kind in MAPS.values() if kind.given is None}


def pairs_among(roles: Collection[str]) -> dict[str, tuple[str, str]]:
    """The explained and the given role of each map that two of these roles make."""
    return {
        name: (kind.explained, kind.given)
        for name, kind in MAPS.items()
        if kind.given is not None and {kind.explained, kind.given} <= set(roles)
    }


def scores_among(roles: Collection[str]) -> dict[str, Definition]:
    """The scores that these roles have."""
    return {name: definition for name, definition in SCORES.items() if set(definition.matrices) <= {*roles, TARGET}}


def contrasts_among(roles: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The contrasts whose two scores these roles have."""
    return tuple(pair for pair in CONTRASTS if set(pair) <= scores_among(roles).keys())


def score_maps_among(roles: Collection[str]) -> dict[str, ScoreMap]:
    """The maps that add up to a score of these roles."""
    return {name: kind for name, kind in SCORE_MAPS.items() if {role for share in kind.shares for role in share} <= {*roles, TARGET}}


def shares_among(roles: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The (role, matrix) shares from which the score maps of these roles are combined."""
    return tuple(dict.fromkeys(share for kind in score_maps_among(roles).values() for share in kind.shares))


def permuted_among(roles: Collection[str]) -> tuple[str, ...]:
    """The matrices whose images are permuted for the p-values of these roles' scores."""
    return tuple(dict.fromkeys(definition.permuted for definition in scores_among(roles).values()))
