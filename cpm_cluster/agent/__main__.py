"""`python PACKAGE RUN_DIR`: run this node's part of a run, and leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

from cpm_cluster.agent.guard import guarded
from cpm_cluster.agent.node import NodeAgent


def main() -> int:
    """The exit code of the training, see `agent/node.py`; 2 for a wrong command line."""
    if len(sys.argv) != 2:
        print("usage: python PACKAGE RUN_DIR", file=sys.stderr)
        return 2
    return guarded(lambda: NodeAgent(Path(sys.argv[1])).run())


if __name__ == "__main__":
    sys.exit(main())
