"""What the work of a run costs in seconds: the model of costs, and the probe that measures it."""
