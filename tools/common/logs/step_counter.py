"""Numbers the steps of a log whose lines do not: by the progress bar that is printed between them, which may lag behind."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

_BAR = re.compile(r"(?<![\d.])(\d+)/(\d+)(?=\s*(?:\[\d|\{|$))")


class StepCounter:
    """Follows the progress bars up to each line with numbers."""

    def __init__(self) -> None:
        self._bars: dict[int, int] = {}  # total -> newest count: an evaluation has a bar of its own
        self._total: int | None = None  # of the newest bar
        self._marks: list[tuple[int | None, dict[int, int]]] = []

    def see(self, line: str) -> None:
        """Take a line."""
        for count, total in _BAR.findall(line):
            self._total = int(total)
            self._bars[self._total] = int(count)

    def mark(self) -> None:
        """Note that the line just seen has the numbers of a step."""
        self._marks.append((self._total, dict(self._bars)))

    def steps(self) -> list[int]:
        """Return the step of each mark. Marks come at equal distances; a count that falls is a restart. No bar: 1, 2 ..."""
        totals = Counter(total for total, _ in self._marks if total is not None)
        if not totals:
            return list(range(1, len(self._marks) + 1))
        train = totals.most_common(1)[0][0]
        counts = [bars.get(train, 0) for _, bars in self._marks]
        ahead = [after - before for before, after in pairwise(counts) if after >= before]
        every = max(round(sum(ahead) / len(ahead)), 1) if ahead else max(counts[0], 1)
        steps: list[int] = []
        for index, count in enumerate(counts):
            least = -(-max(count, 1) // every) * every  # the next line that the bar has not passed
            restarted = index > 0 and count < counts[index - 1]
            steps.append(least if not steps or restarted else max(steps[-1] + every, least))
        return steps
