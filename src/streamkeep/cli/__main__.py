"""`python -m streamkeep.cli`."""

from . import main

main()
