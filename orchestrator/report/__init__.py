"""Makes the report of a run, its CSVs, pictures and page, from tables alone; `render` is the entry point."""
