"""Makes the rows of the report's tables from the records of a run."""
