"""Fold a LoRA delta into its base: ``python -m cpm_cluster.training.merge_delta BASE DELTA OUT …``.

The result is a plain CPM-9G state dict, in the base's number type.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Sequence

import torch

from cpm_cluster.training.engines.torch_state import read_tensors
from cpm_cluster.training.errors import EXIT_USER_ERROR, UserError
from cpm_cluster.training.files import write_atomically
from cpm_cluster.training.lora import merge_lora


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the merged weights; return the exit code."""
    parser = argparse.ArgumentParser(description="Fold a LoRA delta into its base weights.")
    parser.add_argument("base", type=Path, help="state dict with CPM-9G names")
    parser.add_argument("delta", type=Path, help="weights/delta.pt of a LoRA run")
    parser.add_argument("output", type=Path, help="state dict to write")
    parser.add_argument("--alpha", type=float, required=True, help="method.alpha of the LoRA run")
    parsed = parser.parse_args(arguments)
    try:
        merged = merge_lora(read_tensors(parsed.base), read_tensors(parsed.delta), parsed.alpha)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    write_atomically(parsed.output, partial(torch.save, merged))
    return 0


if __name__ == "__main__":
    sys.exit(main())
