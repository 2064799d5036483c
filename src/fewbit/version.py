"""The version of fewbit."""

__version__ = "0.1.0"
