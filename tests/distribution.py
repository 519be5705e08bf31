"""Whether draws follow a distribution, by Pearson's chi-squared statistic."""

import torch
from torch import Tensor

ENOUGH = 10  # draws that a cell must expect: with fewer, one draw more than expected is no longer a small deviation


def assert_follows(counts: Tensor, probability: Tensor, p_value: float = 1e-7) -> None:
    """That `counts` [V] of independent draws are likely enough to come from `probability` float64 [V].

    Tokens that expect too few draws for the statistic are one cell together, with the least likely of the others where
    they are still too few.
    """
    assert not counts[probability == 0].any()
    expected, order = (probability.double() * counts.sum()).sort()
    counts = counts.double()[order]
    few = int((expected.cumsum(0) < ENOUGH).sum()) + 1  # tokens of the first cell
    few = max(few, int((expected < ENOUGH).sum()))
    cells = [torch.cat([x[:few].sum()[None], x[few:]]) for x in (counts, expected)]
    freedom = len(cells[0]) - 1
    if freedom < 1:
        return
    statistic = ((cells[0] - cells[1]).square() / cells[1]).sum()
    found = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.double), statistic / 2)
    assert found > p_value, f"chi-squared {float(statistic):.1f} with {freedom} degrees of freedom"
