"""Judges a model or a plan: lm-eval tasks, likelihood of a text, retrieval, calibration, and paired statistics."""
