"""Ops with an output head whose vocabulary is shared out among the ranks of a process group."""

from pmc_fast.parallel_head.collapse_loss import collapse_loss
from pmc_fast.parallel_head.linear_logprob import linear_logprob
from pmc_fast.parallel_head.linear_sample import linear_sample
from pmc_fast.parallel_head.shards import VocabShards

__all__ = ["VocabShards", "collapse_loss", "linear_logprob", "linear_sample"]
