"""Text for judging and healing: read, mixed, formatted, packed, batched, sampled."""
