"""Asks a cluster's job server for its nodes, as `ray list nodes` does, without the three seconds of its imports.

python tests/cluster/state_api.py URL       prints the nodes as JSON, with the token of the home folder
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def nodes_of(url: str, token: str) -> list[dict[str, Any]]:
    """Returns what Ray's state API reports on each node, living or dead.

    Raises:
        OSError: the server does not answer, or refuses the token.
    """
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/api/v0/nodes?detail=1", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["data"]["result"]["result"]


if __name__ == "__main__":
    print(json.dumps(nodes_of(sys.argv[1], (Path.home() / ".ray" / "auth_token").read_text().strip())))
