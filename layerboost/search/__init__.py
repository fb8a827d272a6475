"""Searching plans: what may be proposed, what proposes it, and the front of what was tried."""
