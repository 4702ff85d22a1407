"""What many may have together: each its least whatever the others do, and all of it given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol import Budget


def test_nobody_can_take_what_another_one_needs_at_least() -> None:
    budget = Budget(100, least=10, holders=3)
    greedy, late, last = budget.account(), budget.account(), budget.account()
    assert greedy.take(80) and greedy.used == 80, "its least, and all of the rest"
    assert not greedy.take() and greedy.used == 80
    assert late.take(10) and not late.take()
    assert last.take(9) and not last.take(2) and last.take()
    greedy.give()
    assert late.take(), "what one gives another can have"
    assert not greedy.take()


def test_giving_below_the_least_gives_nobody_more() -> None:
    budget = Budget(30, least=10, holders=2)
    one, two = budget.account(), budget.account()
    assert one.take(20) and two.take(10)
    two.give(10)
    assert not one.take(), "it was promised to the other"
    one.give(100)
    assert (one.used, budget.rest) == (0, 10)


@given(
    least=st.integers(0, 5),
    rest=st.integers(0, 12),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(-8, 8)), max_size=60),
)
def test_it_is_what_it_says(least: int, rest: int, steps: list[tuple[int, int]]) -> None:
    """A request is granted exactly if what all have beyond their least would still fit the rest."""
    budget = Budget(least * 3 + rest, least=least, holders=3)
    accounts = [budget.account() for _ in range(3)]
    used = [0, 0, 0]
    for who, count in steps:
        if count < 0:
            accounts[who].give(-count)
            used[who] = max(0, used[who] + count)
        else:
            after = [each + count * (index == who) for index, each in enumerate(used)]
            fits = sum(max(0, each - least) for each in after) <= rest or count == 0
            assert accounts[who].take(count) == (fits or after[who] <= least)
            if fits or after[who] <= least:
                used = after
        assert [each.used for each in accounts] == used
        assert sum(used) <= budget.total
    for account in accounts:
        account.give(account.used)
    assert budget.rest == rest
