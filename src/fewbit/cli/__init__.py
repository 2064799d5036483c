"""The command line."""

from fewbit.cli.main import main

__all__ = ["main"]
