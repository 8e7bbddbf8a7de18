"""`python -m tensormix.cli`."""

from tensormix.cli.verbs import main

main()
