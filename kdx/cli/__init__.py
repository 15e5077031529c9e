"""The command line. The commands are imported only after Ctrl-C is handled, because a user may press it at once."""

from kdx.cli import interruption


def main() -> None:
    """The entry point. Ctrl-C and SIGTERM end it with one line and status 130."""
    with interruption.interruptible(), interruption.ended_with_one_line():
        from kdx.cli.commands import run

        run()
