"""Steps have few rows where a graph of so few is worth the making."""

import random

import pytest

from pmc_fast import graph_rows
from pmc_fast.graph_rows import GraphRows


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Graphs of few rows, made soon."""
    monkeypatch.setattr(graph_rows, "LEAST_ROWS", 4)
    monkeypatch.setattr(graph_rows, "SPARED_ROWS", 100)


@pytest.mark.parametrize(
    ("rows", "halved"),
    [(1, [1]), (4, [4]), (5, [4, 5]), (20, [4, 8, 12, 20]), (24, [4, 8, 12, 24]), (64, [4, 8, 16, 32, 64])],
)
def test_all_rows_are_halved_as_often_as_the_texts_allow(rows, halved):
    fewest = GraphRows(rows).fewest
    assert [fewest(texts) for texts in range(rows + 1)] == [min(x for x in halved if x >= t) for t in range(rows + 1)]


def test_steps_have_all_rows_until_fewer_would_have_spared_as_much_as_a_graph_costs():
    of = GraphRows(24)
    rows = []
    for texts in [*[11] * 12, *[3] * 12, *[6] * 30, 13, 12, 3]:
        rows.append(of.of_graph(texts))
        of.note(texts)
    # 12 of 24 rows spare 100 in 9 steps; after that 4 spare 8 of 12 in each of 13, and 8 spare 4 in each of 25.
    assert rows[:24] == [24] * 9 + [12] * 3 + [12] * 12
    assert rows[24:] == [12] * 25 + [8] * 5 + [24, 12, 8]


def test_whatever_has_a_graph_the_rows_hold_the_texts_and_more_texts_have_no_fewer(rng_seed):
    chance = random.Random(rng_seed)
    rows = chance.randint(1, 70)
    of = GraphRows(rows)
    for _ in range(200):
        has = [of.of_graph(texts) for texts in range(rows + 1)]
        assert all(held >= texts for texts, held in enumerate(has)) and has == sorted(has)
        of.note(min(rows, round(chance.expovariate(3 / rows))))
    assert len(set(has)) > 1 or rows <= 4
