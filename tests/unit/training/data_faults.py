"""What may befall ranks while they read their data; handed to ``start_ranks``, it takes hold in a rank's process."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cpm_cluster.training.data import corpus, encoded_part


@dataclass(frozen=True)
class SlowEncoding:
    """Parts are of a kilobyte, and each few rows take so many seconds to encode."""

    seconds: float

    def __call__(self, rank: int) -> None:
        """Take hold."""
        encode = encoded_part.encode_rows
        corpus.PART_BYTES = 1000
        encoded_part._ROWS_AT_ONCE = 8

        def slowly(rows, tokenizer):
            time.sleep(self.seconds)
            return encode(rows, tokenizer)

        encoded_part.encode_rows = slowly
