"""`python -m gae`: the same as `gae`."""

from gae.cli import main

main()
