"""A pool of actors that work on units, with retries, time limits and growth."""
