"""Who goes with whom: the pairing of rows and columns with the largest sum (the linear assignment problem).

Shortest augmenting paths: R. Jonker and A. Volgenant, "A Shortest Augmenting Path Algorithm for Dense and Sparse Linear
Assignment Problems", Computing 38 (1987), doi:10.1007/BF02278710. Rows whose best column is wanted by no other, as it
is between relatives, cost no more than looking; each other one costs a search of at most n steps over n numbers.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def assign(gain: Floats) -> Indices:
    """The column of each row, no column twice, with the largest sum of `gain` `[n, n]`.

    Where several pairings have that sum it is one of them, the same at any time.
    """
    pairs = _Pairs(-gain)
    for row in np.flatnonzero(pairs.column_of < 0):
        pairs.add(int(row))
    return pairs.column_of


class _Pairs:
    """A pairing of some rows and columns which none of the same rows with prices for columns can better.

    Paid by a row for a column is its cost less the column's price; paired rows pay the least that they can.
    """

    def __init__(self, cost: Floats) -> None:
        size = len(cost)
        self.cost = cost
        self.prices = cost.min(axis=0, initial=np.inf)
        self.row_of = np.full(size, -1)
        self.column_of = np.full(size, -1)
        paid = cost - self.prices
        self.paid = paid.min(axis=1, initial=np.inf)
        for row, column in enumerate(paid.argmin(axis=1) if size else ()):
            if self.row_of[column] < 0:
                self._pair(row, column)

    def _pair(self, row: int, column: int) -> None:
        self.row_of[column], self.column_of[row] = row, column

    def add(self, first: int) -> None:
        """Pair the row `first` too: others move on along the cheapest way to a column that is free."""
        size = len(self.cost)
        reach = np.full(size, np.inf)  # what it costs to get to each column
        before = np.full(size, -1)  # the row from which
        done = np.zeros(size, dtype=bool)
        rows = [first]
        row, spent = first, 0.0
        while True:
            ways = self.cost[row] - self.prices
            ways += spent - self.paid[row]
            shorter = (ways < reach) & ~done
            reach[shorter] = ways[shorter]
            before[shorter] = row
            column = int(np.where(done, np.inf, reach).argmin())
            spent = float(reach[column])
            done[column] = True
            if self.row_of[column] < 0:
                break
            row = int(self.row_of[column])
            rows.append(row)
        self.paid[first] += spent
        moved = np.array(rows[1:], dtype=np.int64)
        self.paid[moved] += spent - reach[self.column_of[moved]]
        self.prices[done] -= spent - reach[done]
        while True:  # back along the way
            row = int(before[column])
            self.row_of[column] = row
            self.column_of[row], column = column, int(self.column_of[row])
            if row == first:
                break
