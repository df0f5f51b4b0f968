"""`python -m lance_edge` is the `lance-edge` command."""

from lance_edge.cli import main

main()
