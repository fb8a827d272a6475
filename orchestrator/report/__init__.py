"""The report of a run: CSVs, pictures and one page, all computed from tables alone; `render` makes the files."""
