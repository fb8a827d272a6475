"""One file for each command of `layerboost`; each has a function that takes the parsed arguments."""
