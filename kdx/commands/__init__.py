"""What each command does. `kdx.cli` is the thin layer above."""
