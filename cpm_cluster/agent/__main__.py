"""What runs in a job, from the package's copy in the run directory.

`python PACKAGE RUN_DIR` is this node's part of a run. Further words are of the batch script: `begin` asks after a
restart whether to go on; `end CODE` does what follows an attempt; `clean` runs on nodes that nobody has cleaned up.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cpm_cluster.agent import requeue
from cpm_cluster.agent.guard import guarded
from cpm_cluster.agent.node import NodeAgent


def main() -> int:
    """The exit code of the training, see `agent/node.py`; 2 for a wrong command line."""
    words = sys.argv[1:]
    if len(words) == 1:
        run_dir = Path(words[0])
        return guarded(lambda: NodeAgent(run_dir).run(), lambda number: NodeAgent(run_dir).clean_up_after(number))
    if len(words) == 2 and words[1] == "begin":
        return requeue.begin(Path(words[0]))
    if len(words) == 2 and words[1] == "clean":
        return NodeAgent(Path(words[0])).clean_up_if_lost()
    if len(words) == 3 and words[1] == "end" and words[2].isdigit():
        return requeue.end(Path(words[0]), int(words[2]))
    print("usage: python PACKAGE RUN_DIR [begin | end CODE | clean]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
