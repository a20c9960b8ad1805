"""`python -m flows`: the `fedpipe` command."""

from flows.cli import main

main()
