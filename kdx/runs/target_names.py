"""The target of a run in words."""

from __future__ import annotations

_NOUNS = {"prototypes": "the class means", "soft": "the soft labels", "images": "the image embeddings"}


def target_noun(name: str) -> str:
    """The target of this name in words, which replace "the labels"."""
    return _NOUNS.get(name.partition(":")[0], "the class embeddings")


def target_phrase(name: str) -> str:
    """The target of this name in words, with its file or network."""
    kind, _, rest = name.partition(":")
    return f"{target_noun(name)} {'of the network' if kind in ('prototypes', 'soft') else 'in'} {rest if kind in _NOUNS else name}"
