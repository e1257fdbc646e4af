"""The progress of training, in k-means problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[[int, int], None]
"""Called with (k-means problems done, problems in all)."""


class Work:
    """Counts k-means problems over several trainings."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._total = self._finished = self._current = 0

    def expect(self, problems: Iterable[int]) -> None:
        self._total += sum(problems)

    def advance(self, done: int, total: int) -> None:
        """Report problems done and in all, of the training that runs."""
        self._current = total
        if self._progress:
            self._progress(self._finished + done, self._total)

    def finish(self) -> None:
        """The training that runs is over."""
        self._finished += self._current
        self._current = 0
