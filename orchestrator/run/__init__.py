"""A run: its folder, records, state, identities, progress, and what its stages share."""
