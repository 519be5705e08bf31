"""Importing pmc_fast is light: checked in fresh processes."""

import functools
import json
import subprocess
import sys

import pytest

HEAVY = ("transformers", "nltk", "matplotlib", "triton", "tokenizers", "tqdm", "scipy", "pandas")


@functools.cache
def modules_after(code: str) -> set[str]:
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_does_not_even_import_torch():
    loaded = modules_after("import pmc_fast; pmc_fast.__version__; dir(pmc_fast)")
    assert "pmc_fast" in loaded
    assert not loaded & {"torch", "numpy", "pmc_fast._C", *HEAVY}


@pytest.mark.parametrize("module", ["pmc_fast.ops", "pmc_fast.backend", "pmc_fast.errors", "pmc_fast.data"])
def test_what_a_module_brings_in(module):
    # Whatever torch itself brings in is not ours.
    loaded = modules_after(f"import {module}") - modules_after("import torch")
    assert module in loaded
    assert not loaded & {"pmc_fast._C", *HEAVY}


def test_the_compiled_module_comes_with_the_first_op_that_needs_it():
    loaded = modules_after("import torch, pmc_fast; pmc_fast.sample(torch.zeros(1, 3), impl='native')")
    assert "pmc_fast._C" in loaded and "pmc_fast.native.sample" in loaded
    assert not loaded & {"pmc_fast.reference.sample", "pmc_fast.native.collapse_loss"}


def test_every_public_name_is_there():
    import pmc_fast

    for name in pmc_fast.__all__:
        assert getattr(pmc_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pmc_fast.nonsense
