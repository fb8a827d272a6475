"""Runs units of work on a pool of actors, with retries, time limits and growth."""
