"""The stages of a run. Each file has a function that does what is not recorded, given the run's context."""
