"""The ranges that profilers see."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import QA
from pmc_fast.phases import _NOBODY_LISTENS, PHASES, PREFIX, phase


def test_nothing_happens_when_nobody_listens():
    assert phase("score") is _NOBODY_LISTENS


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_a_profiler_sees_every_phase_of_a_step(impl, monkeypatch, rng_seed):
    config = PMCConfig(num_samples=6, max_new_tokens=30, max_length=None, temperature=2.0, seed=rng_seed)
    pmc = PMC(make_model(seed=rng_seed), make_tokenizer(), config)
    sample = pmc.sampler.sample
    monkeypatch.setattr(pmc.sampler, "sample", lambda *args, **options: sample(*args, impl=impl, **options))
    pmc.initialise(["a?", "b?"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        pmc.loss([0, 1], [QA("c?", "d")])
    seen = {event.key: event.count for event in profiler.key_averages() if event.key.startswith(PREFIX)}
    assert set(seen) - {PREFIX + "retire"} == {PREFIX + name for name in PHASES[:-2]} - {PREFIX + "retire"}
    assert seen[PREFIX + "prefill"] == seen[PREFIX + "loss"] == 1
    assert seen[PREFIX + "head"] == seen[PREFIX + "sample"] == seen[PREFIX + "decode"] + 1
