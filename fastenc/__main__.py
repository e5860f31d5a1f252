"""`python -m fastenc` is the `fastenc` command."""

from .cli import main

main()
