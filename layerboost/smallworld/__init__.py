"""Holds a small generated world of text, benchmarks and a tiny model that runs offline.

MODEL, TRAIN_TEXT, VALIDATION_TEXT and TASKS are the paths, as strings, of the files that the package ships.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

MODEL = str(_FOLDER / "model")
TRAIN_TEXT = str(_FOLDER / "data" / "train.txt")
VALIDATION_TEXT = str(_FOLDER / "data" / "val.txt")
TASKS = tuple(str(path) for path in sorted((_FOLDER / "data" / "tasks").glob("*.yaml")))
