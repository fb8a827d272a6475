"""Prints the seconds of each test file from one or two results that `pytest --junitxml=FILE` wrote.

    python -m tests.times before.xml after.xml

Setting fixtures up counts for the test that first asks for them. With two results, the files that gained most stand
first; the last row is the sum over all files, which several processes share.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path


def seconds_of_files(result: Path) -> dict[str, float]:
    """Seconds of each test file, by its dotted name."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for case in ElementTree.parse(result).iter("testcase"):
        # The names of test classes, which have capitals, follow the file's.
        file = ".".join(part for part in case.attrib["classname"].split(".") if part == part.lower())
        seconds[file] += float(case.attrib["time"])
    return dict(seconds)


def rows(results: Sequence[Mapping[str, float]]) -> list[tuple[str, list[float]]]:
    """Each file and its seconds in each result, the largest gain (with one result: the largest time) first."""
    files = {file for result in results for file in result}
    found = [(file, [result.get(file, 0.0) for result in results]) for file in files]
    found.sort(key=lambda row: (-(row[1][0] - (row[1][1] if len(row[1]) > 1 else 0.0)), row[0]))
    return [*found, ("all", [sum(result.values()) for result in results])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.xml")
    for file, seconds in rows([seconds_of_files(path) for path in parser.parse_args().results]):
        print("".join(f"{value:10.1f}" for value in seconds), "", file)


if __name__ == "__main__":
    main()
