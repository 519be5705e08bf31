"""Fast kernels for Partial Model Collapse (arXiv 2507.04219); public names load what they need on first use."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "BackendUnavailable": "pmc_fast.errors",
    "CollapseLoss": "pmc_fast.ops",
    "Ledger": "pmc_fast.ledger",
    "PMC": "pmc_fast.pmc",
    "PMCConfig": "pmc_fast.pmc",
    "Prompts": "pmc_fast.prompts",
    "RougeRecall": "pmc_fast.rewards",
    "Sample": "pmc_fast.ops",
    "Sampler": "pmc_fast.sampler",
    "Samples": "pmc_fast.sampler",
    "UserError": "pmc_fast.errors",
    "collapse_loss": "pmc_fast.ops",
    "decode_attention": "pmc_fast.ops",
    "evaluate": "pmc_fast.evaluation",
    "linear_logprob": "pmc_fast.ops",
    "linear_sample": "pmc_fast.ops",
    "packed_attention": "pmc_fast.ops",
    "rouge_l_recall": "pmc_fast.ops",
    "sample": "pmc_fast.ops",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pmc_fast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__():
    return sorted({*globals(), *__all__})
