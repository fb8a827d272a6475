"""Writing to disks and object stores: whole files or none, and retries of what a network fails in."""
