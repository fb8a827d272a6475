"""Exit codes of the command line."""

EXIT_DONE = 0
"""All is done."""

EXIT_FAILED = 1
"""Some units of work failed; each is named, the rest is recorded."""

EXIT_BAD_INPUT = 2
"""Bad input: one line names field, value and remedy, and nothing was started."""

EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C, as shells say it."""
