"""The counts of a soak, and its report if a check fails."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class Wrong(AssertionError):  # noqa: N818 - what it is, not what it is an error of
    """What must hold does not."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise Wrong(text)


@dataclass
class Tally:
    """What happened, over all rounds."""

    rounds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    compared: int = 0

    def report(self, seconds: float) -> str:
        def listed(what: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in sorted(what.items())) or "none"

        return (
            f"{self.rounds.total()} rounds in {seconds / 60:.1f} min: {listed(self.rounds)}\n"
            f"faults: {self.faults.total()}: {listed(self.faults)}\n"
            f"resumed: {self.resumed} times; ends of programs: {listed(self.endings)}\n"
            f"compared: {self.compared} bytes, all right; guests that ran twice: 0, lost: 0"
        )
