"""How many rows a decoding step in a CUDA graph has: few, where a graph of so few is worth the making."""

from __future__ import annotations

from collections import Counter

LEAST_ROWS = 16  # of a graph
# Rows that steps would have spared by a graph of fewer before it is made. The host takes twice some 35 ms to make one of Llama-3.2-3B's
# shape, and on an H200 a step of 160 rows takes 1.0 ms longer than one of 16: 7 us for each row.
SPARED_ROWS = 10_000


class GraphRows:
    """Which numbers of rows have a graph or are to have one: all rows, and others as steps ask for them."""

    def __init__(self, rows: int) -> None:
        self._rows, self._worth = rows, {rows}
        self._spared: Counter[int] = Counter()

    def fewest(self, texts: int) -> int:
        """All rows, halved as often as so many texts allow: what a step has that is launched without a graph."""
        rows = self._rows
        while rows > LEAST_ROWS and texts <= (half := -(-rows // (2 * LEAST_ROWS)) * LEAST_ROWS) < rows:
            rows = half
        return rows

    def of_graph(self, texts: int) -> int:
        """The fewest that hold so many texts and are worth a graph; with more texts no fewer."""
        return min(rows for rows in self._worth if rows >= texts)

    def note(self, texts: int) -> None:
        """After a step of so many texts: what the fewest rows would have spared."""
        fewest = self.fewest(texts)
        self._spared[fewest] += self.of_graph(texts) - fewest
        if self._spared[fewest] >= SPARED_ROWS:
            self._worth.add(fewest)
