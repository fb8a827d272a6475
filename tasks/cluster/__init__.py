"""Connects to the Ray cluster, reads what its nodes have, and divides it among workers."""
