"""The networks of a run as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass

from kdx.report import wording
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
_MEANINGS_WITHOUT_TEACHER = {"base": "The student is compared with this network.", "student": "The run explains this network."}


def network_cards(run: RunRecord) -> list[NetworkCard]:
    meanings = _MEANINGS if "teacher" in run.networks else _MEANINGS_WITHOUT_TEACHER
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
