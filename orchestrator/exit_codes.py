"""Defines the exit codes of the command line."""

EXIT_DONE = 0
"""Everything is done."""

EXIT_FAILED = 1
"""Some units of work failed. Each of them is named, and the others are recorded."""

EXIT_BAD_INPUT = 2
"""An input is bad. One line names the field, the value and the remedy, and nothing was started."""

EXIT_INTERRUPTED = 130
"""The command was ended by Ctrl-C; shells use the same code."""
