"""Says what the work of a run costs in seconds: the cost records, and the probe that measures them."""
