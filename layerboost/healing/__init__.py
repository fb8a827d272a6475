"""Heals a converted model by distillation from its untouched parent."""
