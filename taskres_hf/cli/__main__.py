"""`python -m taskres_hf.cli`."""

from .app import main

main()
