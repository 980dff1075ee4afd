"""`python -m linnet`, for launchers that want a module: `accelerate launch -m linnet train`."""

from linnet.cli import main

main()
