"""Seeded damage of files: of any bytes, and of the values in JSON and TOML."""

from __future__ import annotations

import json
import random
from typing import Any

_NUMBERS = (0, -1, 1, 2**31, 2**31 - 1, -(2**31), 2**63 - 1, 2**64 - 1, 10**30, 0.5, -0.0, 1e308)

HOSTILE_TEXTS = (
    "",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "]]><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    '=HYPERLINK("http://example.org","x")',
    "@SUM(1)",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "\t=1",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\x9b2J",
    "line\nbreak\r\nand\rreturn",
    "\u2028separator\u2029",
    "\u202egnp.exe",
    "\u2066isolate",
    "\ud800",
    "nul\0byte",
    "[bold red]markup[/] [link=http://example.org]x[/link]",
    "../../../../etc/passwd",
    "/dev/zero",
    "a" * 10_000,
    "\N{GRINNING FACE}" * 100,
    "e" + "\u0301" * 500,
)
"""Texts that a page, a terminal, a spreadsheet or a file system might execute."""

_VALUES: tuple[Any, ...] = (*_NUMBERS, *HOSTILE_TEXTS, None, True, [], {}, [[[]]], float("nan"), float("inf"))


def damaged(content: bytes, random_: random.Random, other: bytes = b"") -> bytes:
    """The bytes with one to four changes: flipped bits, changed, deleted, repeated or foreign pieces, extreme integers, or a cut end."""
    data = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        kind = random_.randrange(8)
        place = random_.randrange(len(data) + 1) if random_.random() < 0.5 else random_.randrange(min(len(data), 200) + 1)  # headers
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << random_.randrange(8)
        elif kind == 1 and data:
            data[min(place, len(data) - 1)] = random_.choice((0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + random_.choice((1, 2, 4, 16, 100))]
        elif kind == 4:
            data[place:place] = data[place : place + random_.choice((1, 4, 64, 1000))] * random_.choice((1, 2, 50))
        elif kind == 5:
            size = random_.choice((2, 4, 8))
            number = random_.choice(
                (0, 2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 1 << random_.randrange(8 * size))
            )
            data[place : place + size] = number.to_bytes(size, random_.choice(("little", "big")))
        elif kind == 6:
            piece = other or content
            start = random_.randrange(len(piece) + 1)
            data[place : place + random_.choice((0, 8, 64))] = piece[start : start + random_.choice((8, 64, 500))]
        else:
            digits = [index for index, byte in enumerate(data[:5000]) if 48 <= byte <= 57]
            if digits:
                index = random_.choice(digits)
                data[index : index + 1] = random_.choice((b"99999999999", b"-1", b"1e400", b"0", b"NaN", b"null"))
    return bytes(data)


def changed_value(content: Any, random_: random.Random) -> Any:
    """A copy of a value of JSON with one entry replaced, removed, renamed or nested deeply."""
    copy = json.loads(json.dumps(content))
    places = list(_places(copy))
    if not places:
        return random_.choice(_VALUES)
    holder, key = random_.choice(places)
    kind = random_.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random_.choice(HOSTILE_TEXTS)] = holder.pop(key)
    elif kind == 2:
        for _ in range(random_.choice((2, 50, 150))):
            holder[key] = [holder[key]]
    elif kind == 3:
        other, name = random_.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = random_.choice(_VALUES)
    return copy


def _places(value: Any) -> Any:
    """Every dictionary or list in the value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def damaged_json(content: bytes, random_: random.Random) -> bytes:
    """JSON with a changed entry, or, one time in four, with changed bytes."""
    chance = random_.random()
    if chance < 0.02:
        return random_.choice((b"[", b'{"a":')) * 100_000
    if chance < 0.25:
        return damaged(content, random_)
    return json.dumps(changed_value(json.loads(content), random_)).encode("utf-8", "surrogatepass")
