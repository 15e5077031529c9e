"""The work of each command. `kdx.cli` is the thin layer above."""
