"""Implements the stages of a run. Each stage has a function that does the unrecorded work of a run's context."""
