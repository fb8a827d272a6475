"""Healing as Ray Train jobs with DeepSpeed engines."""
