"""`python -m kdx`: the command line."""

from kdx.cli import main

main()
