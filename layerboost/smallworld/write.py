"""Writes the healing text, the validation text and the tasks.

    python -m layerboost.smallworld.write --out DIR

The committed `data/` folder holds exactly these bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .benchmarks import GENERATION_TASKS, TASKS, task_jsonl, task_yaml
from .world import corpus

DATA_DIR = Path(__file__).parent / "data"
TRAIN_BYTES = 1_500_000
VALIDATION_BYTES = 120_000


def render(train_bytes: int = TRAIN_BYTES, validation_bytes: int = VALIDATION_BYTES) -> dict[str, str]:
    """Returns all files as text, by path relative to the data folder."""
    files = {"train.txt": corpus("train", train_bytes), "val.txt": corpus("validation", validation_bytes)}
    for task in (*TASKS, *GENERATION_TASKS):
        files[f"tasks/{task}.yaml"] = task_yaml(task)
        files[f"tasks/{task}.jsonl"] = task_jsonl(task)
    return files


def main(argv: list[str] | None = None) -> None:
    """Writes the files below `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder to write (default: the package's data/)")
    parser.add_argument("--train-bytes", type=int, default=TRAIN_BYTES, help="least size of train.txt")
    parser.add_argument("--validation-bytes", type=int, default=VALIDATION_BYTES, help="least size of val.txt")
    args = parser.parse_args(argv)
    for name, text in render(args.train_bytes, args.validation_bytes).items():
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        print(path)


if __name__ == "__main__":
    main()
