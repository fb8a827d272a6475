"""Holds one file for each command of `layerboost`; its function takes the parsed arguments."""
