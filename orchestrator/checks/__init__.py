"""Checks the inputs of a run before anything starts; each fault names the field, the value and the remedy."""
