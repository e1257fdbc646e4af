"""Page ids of a preallocated pool and their reference counts; it knows nothing of the pages' content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


class PageError(RuntimeError):
    """A request that the pool cannot serve; no state has changed."""


class PagePoolExhausted(PageError):  # noqa: N818 (a state, named as in serving engines)
    """More pages were requested than are free."""

    def __init__(self, requested: int, free: int, total: int) -> None:
        super().__init__(f"page pool exhausted: requested {requested}, free {free} of {total} pages")
        self.requested, self.free, self.total = requested, free, total


class DoubleFree(PageError):  # noqa: N818
    """A page was released more often than it was taken."""

    def __init__(self, page: int, held: int, released: int) -> None:
        super().__init__(f"double free of page {page}: held {held} times, released {released} times")
        self.page = page


@dataclass(frozen=True)
class PageStats:
    """Counts of pages (a shared page counts once) and of operations since the pool was made."""

    total: int
    in_use: int
    high_water: int
    allocations: int
    frees: int

    @property
    def free(self) -> int:
        return self.total - self.in_use


class PageManager:
    """A pool of page ids 0 .. num_pages - 1 with reference counts: O(1) a page to allocate, share and free.

    Every operation either serves its whole request or raises a `PageError` and changes nothing.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0
        self._refcounts = [0] * num_pages
        self._free_list = list(range(num_pages - 1, -1, -1))  # a stack: the lowest id is handed out first
        self._high_water = self._allocations = self._frees = 0

    def __len__(self) -> int:
        return len(self._refcounts)

    @property
    def free_pages(self) -> int:
        return len(self._free_list)

    @property
    def stats(self) -> PageStats:
        in_use = len(self._refcounts) - len(self._free_list)
        return PageStats(len(self._refcounts), in_use, self._high_water, self._allocations, self._frees)

    def refcount(self, page: int) -> int:
        return self._refcounts[page]

    def allocate(self, n: int) -> list[int]:
        """n free pages, each held once.

        Raises:
            PagePoolExhausted: fewer than n pages are free.
        """
        if n > len(self._free_list):
            raise PagePoolExhausted(n, len(self._free_list), len(self._refcounts))
        pages = [self._free_list.pop() for _ in range(n)]
        for page in pages:
            self._refcounts[page] = 1
        self._allocations += n
        self._high_water = max(self._high_water, len(self._refcounts) - len(self._free_list))
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each page listed (a page listed twice gets two).

        Raises:
            PageError: a page is free.
        """
        for page in pages:
            if self._refcounts[page] == 0:
                raise PageError(f"page {page} is free and cannot be shared")
        for page in pages:
            self._refcounts[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page listed; the last one returns the page to the pool.

        Raises:
            DoubleFree: a page is listed more often than it is held.
        """
        for page, released in Counter(pages).items():
            if released > self._refcounts[page]:
                raise DoubleFree(page, self._refcounts[page], released)
        for page in pages:
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                self._free_list.append(page)
                self._frees += 1

    def grow(self, num_pages: int) -> None:
        """Enlarge the pool to num_pages ids; held pages keep theirs."""
        old = len(self._refcounts)
        assert num_pages >= old
        self._refcounts.extend([0] * (num_pages - old))
        self._free_list[:0] = range(num_pages - 1, old - 1, -1)
