"""`python -m flashgen` is `flashgen`."""

from flashgen.cli.app import main

main()
