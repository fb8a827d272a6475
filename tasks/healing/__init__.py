"""Runs healing as Ray Train jobs with DeepSpeed engines."""
