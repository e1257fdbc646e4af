"""`python -m million_cli` is the command line."""

from million_cli.cli import main

main()
