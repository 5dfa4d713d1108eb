"""`python -m trimfit`, as torchrun starts it."""

from trimfit.cli.main import main

main()
