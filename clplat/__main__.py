"""`python -P -m clplat` is the `clplat` command."""

from clplat.cli import main

main()
