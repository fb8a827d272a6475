"""The version of the package; part of every record's identity."""

__version__ = "0.2.0"
