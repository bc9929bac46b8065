"""How a check is written down: a function that yields what is wrong, and the keys that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cpm_cluster.specs.job import JobSpec

Finding = tuple[str, str]  # (dotted key, what is wrong)
Check = Callable[[JobSpec], Iterator[Finding]]
CHECKS: list[tuple[Check, tuple[str, ...]]] = []


def reads(*keys: str) -> Callable[[Check], Check]:
    """Registers a check with the keys that it reads; mappings of which any part makes sense alone are not named."""

    def register(check: Check) -> Check:
        CHECKS.append((check, keys))
        return check

    return register
