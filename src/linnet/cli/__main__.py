"""`python -m linnet.cli`, and `accelerate launch -m linnet.cli`: the `linnet` program."""

from .app import main

main()
