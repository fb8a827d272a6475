"""Searches plans: defines which may be proposed, proposes them, and finds the front of those that were tried."""
