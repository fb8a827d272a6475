"""Measures what each layer's attention is worth, and how certain that is."""
