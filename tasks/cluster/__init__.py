"""The Ray cluster: connecting to it, what its nodes have, and what each worker gets of it."""
