"""Runs many plans in one pass over the same items."""
