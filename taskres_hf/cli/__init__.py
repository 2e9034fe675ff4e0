"""The command line, `taskres`: one file a command, each thin over the library."""

from .app import main as main
