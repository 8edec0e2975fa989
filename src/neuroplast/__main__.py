"""`python -m neuroplast`: the same as the command `neuroplast`."""

from neuroplast.cli import main

main()
