"""Holds the driver: command line, recipe, run folder, pipeline and report."""
