"""Rows of the report's tables, made from the records of a run."""
