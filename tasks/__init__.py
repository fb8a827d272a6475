"""Distributed work: plain functions of `layerboost` wrapped as Ray tasks, actors, a Tune search and a Train job."""
