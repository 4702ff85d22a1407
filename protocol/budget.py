"""What many may have together, so that none of them can take what another one needs at least."""

from __future__ import annotations


class Budget:
    """`total` of something, for as many as `holders` at a time.

    Each of them may always have `least`. What anybody has beyond that comes out of the rest, for whoever asks first.
    """

    def __init__(self, total: int, *, least: int, holders: int) -> None:
        self.total = total
        self.least = least
        self.rest = total - least * holders
        """What nobody was promised and nobody has."""
        assert self.rest >= 0

    def account(self) -> Account:
        """For one more holder."""
        return Account(self)


class Account:
    """What one holder has of a budget."""

    __slots__ = ("_budget", "used")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.used = 0

    def take(self, count: int = 1) -> bool:
        """Have so much more. False: there is no room, and nothing has changed."""
        return self.hold(self.used + count)

    def give(self, count: int = 1) -> None:
        """Have so much less."""
        self.hold(max(self.used - count, 0))

    def hold(self, amount: int) -> bool:
        """Have so much from now on. False: there is no room, and nothing has changed; less than before there always
        is."""
        budget = self._budget
        least = budget.least
        if amount > least or self.used > least:
            more = max(amount, least) - max(self.used, least)
            if more > budget.rest and more > 0:
                return False
            budget.rest -= more
        self.used = amount
        return True
