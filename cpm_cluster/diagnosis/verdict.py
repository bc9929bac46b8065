"""The Verdict: why a run ended as it did, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """A line that says so: a file of the run directory (or a command), its line (0: the file as a whole), the text."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """`category` groups causes for retry rules; `transient`: the same job may well succeed when it is started again."""

    category: str
    cause: str
    transient: bool
    remedy: str
    evidence: tuple[Evidence, ...] = ()
    node: str | None = None
    rank: int | None = None

    def __str__(self) -> str:
        """One sentence, the remedy, and the evidence below."""
        lines = [f"{self.cause}", f"  what to do: {self.remedy}"]
        for item in self.evidence:
            place = f"{item.file}:{item.line}" if item.line else item.file
            lines.append(f"  {place}: {item.text}")
        return "\n".join(lines)
