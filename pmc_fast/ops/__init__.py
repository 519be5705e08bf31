"""The ops: each a contract, its checks, the choice of implementation and the registration with torch."""

from pmc_fast.ops.collapse_loss import CollapseLoss, collapse_loss
from pmc_fast.ops.decode_attention import decode_attention
from pmc_fast.ops.linear_logprob import linear_logprob
from pmc_fast.ops.linear_sample import linear_sample
from pmc_fast.ops.packed_attention import packed_attention
from pmc_fast.ops.rouge_l_recall import rouge_l_recall
from pmc_fast.ops.sample import Sample, sample

__all__ = [
    "CollapseLoss",
    "Sample",
    "collapse_loss",
    "decode_attention",
    "linear_logprob",
    "linear_sample",
    "packed_attention",
    "rouge_l_recall",
    "sample",
]
