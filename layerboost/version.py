"""Holds the version of the package, which is part of every record's identity."""

__version__ = "0.2.0"
