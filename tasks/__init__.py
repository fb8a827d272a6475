"""Distributes work: wraps plain functions of `layerboost` as Ray tasks, actors, a Tune search and a Train job."""
