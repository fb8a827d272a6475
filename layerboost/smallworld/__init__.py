"""A small generated world: text, benchmarks and a tiny model that run offline."""
