"""The recipe: what to run, as one frozen object that is checked once, when it is read."""
