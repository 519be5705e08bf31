"""Choosing among the instruction sets that this machine has."""

import os
import subprocess
import sys

import pytest

from pmc_fast.native import library

SHOW = "from pmc_fast.native import library; print(library().instruction_set())"


def run(code: str, isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PMC_FAST_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_plain_one_is_always_there_and_last():
    sets = library().instruction_sets()
    assert sets[-1] == "baseline" and len(set(sets)) == len(sets)


@pytest.mark.parametrize("isa", library().instruction_sets())
def test_the_environment_variable_forces_one(isa):
    assert run(SHOW, isa).stdout.strip() == isa


def test_an_empty_environment_variable_leaves_the_fastest():
    assert run(SHOW, "").stdout.strip() == library().instruction_sets()[0]


def test_a_name_that_does_not_exist_is_an_error_that_lists_those_that_do():
    before = library().instruction_set()
    with pytest.raises(ValueError, match="'sse9'.*baseline"):
        library().use_instruction_set("sse9")
    assert library().instruction_set() == before


def test_a_wrong_environment_variable_makes_native_unavailable_not_silently_slow():
    code = """
import torch, pmc_fast
try:
    pmc_fast.sample(torch.zeros(1, 3), impl="native")
except pmc_fast.BackendUnavailable as error:
    print(error)
pmc_fast.sample(torch.zeros(1, 3))
"""
    done = run(code, "sse9")
    assert (
        done.stdout.startswith("sample(impl='native')")
        and "PMC_FAST_ISA names the instruction set 'sse9'" in done.stdout
    )
    assert done.returncode == 0 and "slow reference" in done.stderr and "sse9" in done.stderr


def test_using_one_takes_effect():
    before = library().instruction_set()
    try:
        for isa in library().instruction_sets():
            library().use_instruction_set(isa)
            assert library().instruction_set() == isa
    finally:
        library().use_instruction_set(before)
