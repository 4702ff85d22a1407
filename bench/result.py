"""One measured figure, as `make bench ARGS=--json` prints it."""

from __future__ import annotations

from typing import TypedDict


class Result(TypedDict):
    """`floor` is what the least possible code took for the same work in the same run; `ratio` is value / floor."""

    name: str
    value: float
    unit: str
    floor: float | None
    ratio: float | None
    target: str | None
    met: bool | None
