"""The networks of a run as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass

from kdx.report import wording
from kdx.roles import counterpart
from kdx.runs.record import RunRecord


@dataclass(frozen=True)
class NetworkCard:
    """One network, as text. ``share`` is its number of parameters relative to the teacher's, or empty."""

    role: str
    meaning: str
    reference: str
    parameters: str
    share: str
    accuracy: str
    interval: str
    count: str


_MEANINGS = {
    "teacher": "The student learned from this network.",
    "base": "This network has the student’s architecture and was trained without the teacher.",
    "student": "This network has the base’s architecture and learned from the teacher.",
}
_MEANINGS_WITHOUT_BASE = {"teacher": "The student is compared with this network.", "student": "This network learned from the teacher."}
_MEANINGS_WITHOUT_TEACHER = {"base": "The student is compared with this network.", "student": "The run explains this network."}


@dataclass(frozen=True)
class Titles:
    """The page's heading, its short form for the browser's tab, and the heading of the networks."""

    page: str
    tab: str
    networks: str


def titles(run: RunRecord) -> Titles:
    roles = set(run.roles)
    number = {1: "The network", 2: "The two networks", 3: "The three networks"}[len(roles)]
    if roles == {"student"}:
        return Titles("Where the student’s features are relevant", "The student alone", number)
    if "teacher" not in roles:
        return Titles("How the student differs from the base", "Student and base", number)
    if "base" not in roles:
        return Titles("How the student differs from its teacher", "Student and teacher", number)
    return Titles("What the student learned from its teacher", "What the student learned", number)


def discordant(run: RunRecord) -> tuple[int, int] | None:
    """The number of images that only the student, and that only its counterpart, classifies correctly; None for a student alone."""
    other = counterpart(run.roles)
    if other is None:
        return None
    student, rival = run.samples.correct("student"), run.samples.correct(other)
    return int((student & ~rival).sum()), int((rival & ~student).sum())


def _layer_of(run: RunRecord, role: str, layer: str) -> str:
    """The name that a role's network has for a layer of the student."""
    if role == "teacher":
        return run.layers[layer]
    return run.manifest["configuration"].get("base_layers", {}).get(layer, layer) if role == "base" else layer


def layer_table(run: RunRecord) -> dict[str, list[str]]:
    """The layers that are compared, by the roles that have these names for them; empty if all networks of the run have the same."""
    by_role = {role: [_layer_of(run, role, layer) for layer in run.layers] for role in ("student", "base", "teacher") if role in run.roles}
    columns: dict[tuple[str, ...], list[str]] = {}
    for role, names in by_role.items():
        columns.setdefault(tuple(names), []).append(role)
    if len(columns) == 1:
        return {}
    return {" and ".join(roles).capitalize(): list(names) for names, roles in columns.items()}


def network_cards(run: RunRecord) -> list[NetworkCard]:
    meanings = _MEANINGS if "teacher" in run.networks else _MEANINGS_WITHOUT_TEACHER
    if "base" not in run.networks and "teacher" in run.networks:
        meanings = _MEANINGS_WITHOUT_BASE
    largest = run.networks["teacher"].parameters if "teacher" in run.networks else None
    cards = []
    for role, network in run.networks.items():
        share = ""
        if largest and network.parameters and role != "teacher":
            share = f"{wording.number(100 * network.parameters / largest, 1)}% of the teacher’s"
        cards.append(
            NetworkCard(
                role,
                f"{meanings[role]} Some or all of its weights are random." if network.random_weights else meanings[role],
                network.reference,
                f"{network.parameters:,}" if network.parameters else "not recorded",
                share,
                wording.percent(network.accuracy.value),
                " to ".join(map(wording.percent, network.accuracy.interval)),
                f"{network.correct:,} of {network.n:,} images",
            )
        )
    return cards
