"""Several processes: vocabulary-parallel heads and data-parallel training."""

from pmc_fast.parallel.data import LossModule, initialise, merge_ledgers
from pmc_fast.parallel_head import VocabShards, collapse_loss, linear_logprob, linear_sample
from pmc_fast.sharding import gathered

__all__ = [
    "LossModule",
    "VocabShards",
    "collapse_loss",
    "gathered",
    "initialise",
    "linear_logprob",
    "linear_sample",
    "merge_ledgers",
]
