"""Running a recipe as a job of a Ray cluster elsewhere, and following its log."""
