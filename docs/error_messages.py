"""Lists every error message of kdx in docs/troubleshooting.md: ``python -m docs.error_messages``.

The messages are read from the source: each call of KdxError (or of a class derived from it) with its problem and its hint. A
folder's messages stand between the markers ``<!-- errors FOLDER -->`` and ``<!-- /errors -->``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("troubleshooting.md")

TOPICS = {
    "data": ("data", "remote", "remote_lock"),
    "models": ("models",),
    "distill": ("distill", "callbacks"),
    "features": ("features", "maps", "cam", "scores", "kernels"),
    "explain": ("explain", "runs", "report", "study", "disk", "figure_files", "cluster"),
    "evaluate": ("evaluate",),
    "runtimes": ("runtimes",),
    "export": ("export", "commands"),
    "install": ("errors",),
}
"""The folders (or files) of kdx whose messages make a topic of the page."""


@dataclass(frozen=True)
class Message:
    """One error as Markdown: what the user reads, with the varying parts in italics."""

    folder: str
    problem: str
    hint: str


class _Source:
    """The modules of kdx, and the texts that they give names to."""

    def __init__(self) -> None:
        self.modules: dict[Path, ast.Module] = {}
        for folder in ("kdx", "export", "kernels"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                relative = path.relative_to(ROOT)
                if relative.parts[:2] not in (("kdx", "export"), ("kdx", "kernels")):  # links to the folders beside kdx/
                    self.modules[relative] = ast.parse(path.read_text("utf-8"))
        self.constants: Texts = {}
        for module in self.modules.values():
            self.constants |= _assigned(module.body)
        self.errors = {"KdxError"} | {
            node.name
            for module in self.modules.values()
            for node in ast.walk(module)
            if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "KdxError" for base in node.bases)
        }

    def messages(self) -> Iterator[Message]:
        for path, module in self.modules.items():
            calls = list(_calls(module, None))
            parts = path.with_suffix("").parts
            own = self.constants | _assigned(module.body)  # other modules may have constants of the same name
            folder = parts[1] if parts[0] == "kdx" else parts[0]
            for function, call in calls:
                if not (isinstance(call.func, ast.Name) and call.func.id in self.errors):
                    continue
                values = dict(zip(("problem", "hint"), call.args, strict=False))
                values |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                for arguments in _arguments(function, calls):
                    names = own | arguments | _assigned(ast.walk(function) if function else ())
                    message = Message(folder, *(_written(values[name], names) for name in ("problem", "hint")))
                    if message.problem != "*problem*":  # else it passes on the problem of another error
                        yield message


Texts = dict[str, list[ast.expr]]
"""The texts that a name can stand for."""


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.Dict):
        return bool(node.values) and all(map(_is_text, node.values))
    if _looked_up(node):
        return True
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _looked_up(node: ast.expr) -> str | None:
    """The name of the constant in ``NAME.get(key, "text")``."""
    if isinstance(node, ast.Call) and len(node.args) == 2 and _is_text(node.args[1]) and isinstance(node.func, ast.Attribute):
        table = node.func.value
        return table.id if node.func.attr == "get" and isinstance(table, ast.Name) and table.id.isupper() else None
    return None


def _calls(node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call, with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = child if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call):
            yield inside, child
        yield from _calls(child, inside)


def _assigned(nodes: Iterable[ast.AST]) -> Texts:
    texts: Texts = {}
    for node in nodes:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(target, ast.Name) and value is not None and _is_text(value):
            texts.setdefault(target.id, []).append(value)
    return texts


def _arguments(function: ast.FunctionDef | None, calls: list[tuple[ast.FunctionDef | None, ast.Call]]) -> list[Texts]:
    """The texts that the parameters of a private function stand for, one entry per call of it."""
    if function is None or not function.name.startswith("_"):
        return [{}]
    parameters = [argument.arg for argument in function.args.args]
    named = zip(parameters[::-1], function.args.defaults[::-1], strict=False)
    defaults = {name: [value] for name, value in named if _is_text(value)}
    own = [call for _, call in calls if isinstance(call.func, ast.Name) and call.func.id == function.name]
    passed = [{name: [value] for name, value in zip(parameters, call.args, strict=False) if _is_text(value)} for call in own]
    return [defaults | texts for texts in passed] or [{}]


def _written(node: ast.expr, names: Texts) -> str:
    """A text as Markdown. Alternatives are divided by a stroke, and what varies is in italics."""
    if isinstance(node, ast.Constant):
        return _escaped(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_written(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        shown = _written(node.value, names)
        return f"'{shown}'" if node.conversion == ord("r") else shown
    if isinstance(node, ast.IfExp):
        alternatives = [_written(part, names) for part in (node.body, node.orelse)]
        return f"{alternatives[0]} / {alternatives[1]}" if all(alternatives) else f"[{''.join(alternatives)}]"
    if isinstance(node, ast.BinOp) and _is_text(node):
        return _written(node.left, names) + _written(node.right, names)
    if isinstance(node, ast.Dict):
        return " / ".join(dict.fromkeys(_written(value, names) for value in node.values))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and _is_table(names.get(node.value.id, [])):
        return _written(node.value, names)
    if isinstance(node, ast.Call) and (table := _looked_up(node)) in names:
        return f"{_written(ast.Name(table), names)} / {_written(node.args[1], names)}"
    if isinstance(node, ast.Name) and node.id in names:
        others = {name: values for name, values in names.items() if name != node.id}
        return " / ".join(dict.fromkeys(_written(value, others) for value in names[node.id]))
    return f"*{_noun(node)}*"


def _is_table(values: list[ast.expr]) -> bool:
    return any(isinstance(value, ast.Dict) for value in values)


def _noun(node: ast.expr) -> str:
    """A word for a value: the last name in its expression that says what it is."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return f"{_noun(node.args[0])}, ..."
    if isinstance(node, ast.Call) and node.args:
        return _noun(node.args[0])
    if isinstance(node, ast.Call):
        return _noun(node.func.value if isinstance(node.func, ast.Attribute) else node.func)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _noun(node.generators[0].iter)
    if isinstance(node, ast.Subscript):
        return _noun(node.value)
    if isinstance(node, ast.BinOp):
        return _noun(node.left)
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").lower().replace("_", " ")
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower().replace("_", " ")
    return next((_noun(child) for child in ast.walk(node) if isinstance(child, ast.Name | ast.Attribute)), "...")


def _escaped(text: str) -> str:
    text = re.sub(r"([\\*_`\[\]|])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def filled(page: str) -> str:
    """The page with the list of each topic. Raises ValueError if a folder has messages and no topic."""
    messages = list(dict.fromkeys(_Source().messages()))
    unknown = {message.folder for message in messages} - {folder for folders in TOPICS.values() for folder in folders}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} raise KdxError and belong to no topic of docs/error_messages.py")
    for topic, folders in TOPICS.items():
        rows = sorted({(message.problem, message.hint) for message in messages if message.folder in folders}, key=_order)
        table = "\n".join(["| Message | Fix |", "| --- | --- |", *(f"| {problem} | {hint} |" for problem, hint in rows)])
        opening, closing = f"<!-- errors {topic} -->\n", "<!-- /errors -->"
        before, marker, after = page.partition(opening)
        if not marker or closing not in after:
            raise ValueError(f"{PAGE.name} has no list for the topic {topic}")
        page = before + opening + table + "\n" + after[after.index(closing) :]
    return page


def _order(row: tuple[str, str]) -> tuple[str, str]:
    return re.sub(r"\W+", " ", row[0]).strip().lower(), row[1]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
