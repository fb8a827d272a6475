"""Represents a run: its folder, records, state, identities and progress, and the context that its stages share."""
