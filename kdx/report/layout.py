"""What all pages share: templates, style, script, security policy, and tables whose numbers a reader can copy."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx.errors import printable
from kdx.report import wording
from kdx.runs.number_text import number

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"

_STYLES = ("base.css",)

_NARROW = ("narrow.css",)
"""The styles of narrow screens, which overrule all others."""

_SCRIPTS = ("theme.js", "downloads.js", "tables.js", "start.js")
"""The parts of every page's script. All parts of a page are inside one function, in the order of the list."""


def render(
    template: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    folder: Path | None = None,
    **content: object,
) -> str:
    """A page as one HTML file that contains all it shows and sends no request.

    template: a template that extends ``base.html.j2``; it is filled with ``content``. folder: where this template and its styles and
    scripts are, if not among those of this package; a template there can still include and extend the ones of this package. styles,
    scripts: the files of this page alone. They follow the files of all pages, except that the styles of narrow screens are last. A script
    can use the functions of the scripts of all pages, and starts itself on ``DOMContentLoaded``.

    The page is the same byte for byte for the same arguments. Text in ``content`` is escaped; `markupsafe.Markup` is not. Raises
    jinja2.UndefinedError where the template uses a name that ``content`` does not have.
    """
    folders = (_TEMPLATES,) if folder is None else (folder, _TEMPLATES)
    return _environment(folders).get_template(template).render(assets=_Assets.load(folders, styles, scripts), **content)


@functools.cache
def _environment(folders: tuple[Path, ...]) -> Environment:
    """Jinja's settings for the templates of these folders. There is one per process, because compiling templates takes longer than filling
    them in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["percent"] = wording.percent
    return environment


def _shown(value: object) -> object:
    """A value of a template. Texts other than kdx's own markup cannot change the direction of the text after them (`printable`)."""
    return printable(value) if type(value) is str else value


def script_json(content: object) -> Markup:
    """JSON that is safe inside a ``<script>`` element: ASCII without ``<``, ``>`` or ``&``, so no tag, comment or line separator."""
    from markupsafe import Markup

    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def nested_facts(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines of name and value."""
    for name, value in content.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from nested_facts(value, f"{path} · ")
        elif value is not None:
            yield path, " × ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class _Assets:
    """The style sheet and the script of a page, and the digest of the script for the page's security policy."""

    style: Markup
    script: Markup
    script_digest: str

    @classmethod
    def load(cls, folders: Sequence[Path], styles: Sequence[str], scripts: Sequence[str]) -> _Assets:
        from markupsafe import Markup

        style = _joined(folders, (*_STYLES, *styles, *_NARROW))
        script = f'"use strict";\n(() => {{\n{_joined(folders, (*_SCRIPTS, *scripts))}}})();\n'
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        return cls(Markup(style), Markup(script), digest)  # our own files; they contain no text from a run


def _joined(folders: Sequence[Path], names: Sequence[str]) -> str:
    paths = [next(path for folder in folders if (path := folder / name).is_file()) for name in names]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@dataclass(frozen=True)
class DataCell:
    """A cell of a `DataTable`.

    text, detail: the number and, in a second line, its interval or p-value, as the page shows them. value, interval: the same with all
    digits, as the CSV has them; None for a cell of words. link: a path relative to the page, or empty.
    """

    text: str
    detail: str = ""
    value: float | int | None = None
    interval: tuple[float, float] | None = None
    link: str = ""

    @classmethod
    def of(cls, value: float, interval: tuple[float, float] | None = None, *, digits: int = 3, sign: bool = False) -> DataCell:
        """A number with this many decimals, with its interval below it unless that is not known."""
        interval = None if interval is None or not all(map(math.isfinite, interval)) else interval
        detail = "" if interval is None else " to ".join(number(x, digits) for x in interval)
        return cls(number(value, digits, sign), detail, value, interval)


@dataclass(frozen=True)
class DataTable:
    """A table with buttons that copy it as CSV or LaTeX and save it as CSV, for the macro ``data_table``.

    name: an id that is unique on the page, and the name of the file. columns: the heads; the first column heads the rows. A column whose
    cells have intervals becomes three columns of the CSV: ``NAME``, ``NAME low`` and ``NAME high``. sortable: whether a click on
    a head sorts the rows, on a page with the script ``sorting.js``.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[DataCell]]
    note: str = ""
    sortable: bool = False
