"""`kdx doctor`."""

from __future__ import annotations

from kdx import progress


def doctor() -> None:
    """List what this machine can run, and what to install for the rest."""
    from rich.markup import escape
    from rich.table import Table

    from kdx.commands.doctor import probe

    table = Table("", "", "result", "hint", box=None, pad_edge=False)
    for finding in probe():
        mark = "[green]yes[/]" if finding.works else "[yellow]no[/]"
        table.add_row(mark, finding.name, escape(finding.result), "" if finding.works else escape(finding.hint))
    progress.console().print(table)
