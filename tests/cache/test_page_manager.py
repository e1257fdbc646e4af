import pytest
from examples import examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from million_cli.cache.page_manager import DoubleFree, PageError, PageManager, PagePoolExhausted, PageStats


def test_hands_out_every_page_once_and_counts():
    manager = PageManager(5)
    assert sorted(manager.allocate(3) + manager.allocate(2)) == [0, 1, 2, 3, 4]
    assert manager.stats == PageStats(total=5, in_use=5, high_water=5, allocations=5, frees=0)
    manager.free([1, 3])
    assert sorted(manager.allocate(2)) == [1, 3]
    assert manager.stats == PageStats(total=5, in_use=5, high_water=5, allocations=7, frees=2)


def test_exhaustion_says_the_numbers_and_takes_nothing():
    manager = PageManager(4)
    manager.allocate(3)
    with pytest.raises(
        PagePoolExhausted, match=r"^page pool exhausted: requested 2, free 1 of 4 pages$"
    ) as error:
        manager.allocate(2)
    assert (error.value.requested, error.value.free, error.value.total) == (2, 1, 4)
    assert manager.free_pages == 1
    assert manager.allocate(1) == [3]


def test_double_free_names_the_page_and_frees_nothing():
    manager = PageManager(4)
    a, b = manager.allocate(2)
    with pytest.raises(DoubleFree, match=rf"page {a}: held 1 times, released 2 times"):
        manager.free([b, a, a])
    assert manager.stats.in_use == 2
    manager.free([a, b])
    with pytest.raises(DoubleFree, match=rf"page {b}: held 0 times, released 1 times"):
        manager.free([b])
    assert manager.free_pages == 4


def test_a_free_page_cannot_be_shared():
    manager = PageManager(2)
    (page,) = manager.allocate(1)
    with pytest.raises(PageError, match=r"page 1 is free"):
        manager.share([page, 1])
    assert manager.refcount(page) == 1


def test_shared_page_lives_until_its_last_holder_lets_go():
    manager = PageManager(1)
    (page,) = manager.allocate(1)
    manager.share([page, page])
    manager.free([page])
    manager.free([page])
    assert manager.free_pages == 0
    manager.free([page])
    assert manager.free_pages == 1
    assert manager.stats == PageStats(total=1, in_use=0, high_water=1, allocations=1, frees=1)


class Pool(RuleBasedStateMachine):
    """Any sequence of operations against a dictionary page -> holders."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = PageManager(6)
        self.total, self.high_water = 6, 0
        self.held: dict[int, int] = {}

    @rule(n=st.integers(0, 5))
    def allocate(self, n: int) -> None:
        if n > self.total - len(self.held):
            with pytest.raises(PagePoolExhausted):
                self.manager.allocate(n)
            return
        pages = self.manager.allocate(n)
        assert len(set(pages)) == n
        assert not set(pages) & set(self.held)
        self.held.update(dict.fromkeys(pages, 1))
        self.high_water = max(self.high_water, len(self.held))

    @rule(pages=st.lists(st.integers(0, 5), max_size=4))
    def share(self, pages: list[int]) -> None:
        if any(page not in self.held for page in pages):
            with pytest.raises(PageError):
                self.manager.share(pages)
            return
        self.manager.share(pages)
        for page in pages:
            self.held[page] += 1

    @rule(pages=st.lists(st.integers(0, 5), max_size=4))
    def free(self, pages: list[int]) -> None:
        if any(pages.count(page) > self.held.get(page, 0) for page in pages):
            with pytest.raises(DoubleFree):
                self.manager.free(pages)
            return
        self.manager.free(pages)
        for page in pages:
            self.held[page] -= 1
            if not self.held[page]:
                del self.held[page]

    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.total += more
        self.manager.grow(self.total)

    @invariant()
    def agrees(self) -> None:
        stats = self.manager.stats
        assert (stats.total, stats.in_use, stats.high_water) == (self.total, len(self.held), self.high_water)
        assert stats.in_use == stats.allocations - stats.frees
        assert [self.manager.refcount(page) for page in range(self.total)] == [
            self.held.get(page, 0) for page in range(self.total)
        ]

    def teardown(self) -> None:
        self.manager.free([page for page, holders in self.held.items() for _ in range(holders)])
        assert sorted(self.manager.allocate(self.total)) == list(range(self.total))


TestPool = Pool.TestCase
TestPool.settings = examples(60, stateful_step_count=30)
