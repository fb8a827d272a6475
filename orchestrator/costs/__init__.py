"""Estimates what a run will cost: a short calibration measures the machine, then each stage is estimated."""
