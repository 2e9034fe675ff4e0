"""`python -m taskres_hf`: the command line."""

from .cli.app import main

main()
