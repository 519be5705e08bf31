"""The sizes that Partial Model Collapse really meets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """A language model head."""

    name: str
    vocab: int
    hidden: int
    bias: bool = False


SMOLLM2_135M = Head("SmolLM2-135M", 49152, 576)
PHI_1_5 = Head("Phi-1.5", 51200, 2048, bias=True)
LLAMA_1B = Head("Llama-3.2-1B", 128256, 2048)
LLAMA_3B = Head("Llama-3.2-3B", 128256, 3072)


@dataclass(frozen=True)
class AttentionHeads:
    """One layer's attention: heads of queries, heads of keys and values, their dimension."""

    queries: int
    keys: int
    dim: int


SMOLLM2_HEADS = AttentionHeads(9, 3, 64)
LLAMA_3B_HEADS = AttentionHeads(24, 8, 128)

DECODE_SAMPLES = 20  # of a question
DECODE_ROWS = 160  # 8 questions x 20 samples
LABEL_ROWS = 557  # answer tokens of 16 training sequences
MANY_LABEL_ROWS = 2048  # a larger batch, or another method's
LARGE_LABEL_ROWS = 8192  # a whole batch of long answers, on a GPU
LARGE_HEAD = Head("8B", 131072, 4096)
LARGE_DECODE_ROWS = 1280  # 64 questions x 20 samples
