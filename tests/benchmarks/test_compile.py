"""`python -m benchmarks compile`: every kernel keeps the limits on every kind of GPU, and a kernel that does not is seen."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile
from benchmarks.__main__ import main

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

# Too many accumulators, too many stages, products in float32, a block that is no power of 2, a missing argument.
BROKEN = """
import triton
import triton.language as tl
from pmc_fast.kernels.variant import Variant


@triton.jit
def product(a, b, c, K, stride, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    k = tl.arange(0, BLOCK)
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(a + m[:, None] * stride + start + k[None, :])
        y = tl.load(b + n[None, :] * stride + start + k[:, None])
        if WIDEN:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def largest(x, out, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        values = tl.maximum(values, tl.load(x + row * stride + start + tl.arange(0, BLOCK)).to(tl.float32))
    tl.store(out + row, tl.max(values, 0))


def variants(capability):
    operands = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32", "stride": "i32"}
    aligned = ("a", "b", "c", "K", "stride")

    def products(name, M, N, BLOCK, num_stages, WIDEN=False):
        constants = dict(M=M, N=N, BLOCK=BLOCK, WIDEN=WIDEN)
        return Variant(name, product, operands, constants, 4, num_stages, matmul=True, aligned=aligned)

    row = {"x": "*bf16", "out": "*fp32", "V": "i32", "stride": "i64"}
    return [
        products("sound", 64, 64, 64, 3),
        products("spills", 256, 256, 64, 2),
        products("greedy", 64, 64, 64, 16),
        products("widens", 64, 64, 64, 3, WIDEN=True),
        Variant("aligned", largest, row, {"BLOCK": 1024}, 4, 1, aligned=("x", "out", "stride")),
        Variant("unaligned", largest, row, {"BLOCK": 1024}, 4, 1),
        Variant("no power of 2", largest, row, {"BLOCK": 1000}, 4, 1),
        Variant("incomplete", largest, row, {}, 4, 1),
    ]
"""


def run(*arguments, kernels=None, **environment):
    """`python -m benchmarks compile` in a process that does not interpret kernels; `kernels` is a folder of more."""
    program = (
        "import sys, pmc_fast.kernels\n"
        f"pmc_fast.kernels.__path__.extend({[str(kernels)] if kernels else []})\n"
        "from benchmarks.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program, "compile", *arguments],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def launched_kernels():
    """The names of what kernels/*.py launches: `name[grid](...)`."""
    nodes = [node for file in (ROOT / "kernels").glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    calls = [node.func.value for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return {value.id for value in calls if isinstance(value, ast.Name)}


def test_every_launched_kernel_has_variants():
    found = [variant for module in compile.kernel_files().values() for variant in module.variants(90)]
    assert launched_kernels() <= {variant.kernel.fn.__name__ for variant in found}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the command says of all kernels, each configuration for one GPU at least, and what it writes."""
    out = tmp_path_factory.mktemp("compiled") / "out.json"
    done = run("--quick", "--json", str(out))
    assert out.exists(), done.stdout + done.stderr
    return done, json.loads(out.read_text())


@pytest.mark.parametrize("capability", compile.MOST_SHARED_BYTES)
def test_every_kernel_keeps_the_limits(capability, compiled):
    done, content = compiled
    assert done.returncode == 0, done.stdout + done.stderr
    assert content["schema"] == compile.SCHEMA
    rows = [row for row in content["rows"] if row["capability"] == capability]
    modules, gpus = compile.kernel_files().values(), list(compile.MOST_SHARED_BYTES)
    turn = gpus.index(capability), len(gpus)
    assert [row["kernel"] for row in rows] == [v.name for m in modules for v in compile.quick(m, capability, *turn)]
    assert {row["function"] for row in rows} >= launched_kernels()
    for row in rows:
        assert row["kernel"] in done.stdout
        assert row["violations"] == [] and 0 < row["registers"] <= 255
        assert row["spill_store_bytes"] + row["spill_load_bytes"] <= compile.MOST_SPILL_BYTES
        shared = row["static_shared_bytes"] + row["dynamic_shared_bytes"]
        assert shared <= compile.MOST_SHARED_BYTES[capability]
    assert any(f"{compile.MATRIX_INSTRUCTION[capability]} 16-bit" in row["matrix_instructions"] for row in rows)


def test_a_quick_run_leaves_out_no_configuration():
    gpus = list(compile.MOST_SHARED_BYTES)
    for module in compile.kernel_files().values():
        chosen = [[v.name for v in compile.quick(module, gpu, turn, len(gpus))] for turn, gpu in enumerate(gpus)]
        assert set().union(*chosen) == {v.name for gpu in gpus for v in module.variants(gpu)}
        assert compile.quick(module, 90, 0, 1) == module.variants(90)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the command says of BROKEN, and its rows by kernel; no earlier compilation is reused."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "broken.py").write_text(BROKEN)
    out = folder / "out.json"
    arguments = ["--op", "broken", "--capability", "90", "--json", str(out)]
    done = run(*arguments, kernels=folder, TRITON_CACHE_DIR=str(folder / "cache"))
    assert out.exists(), done.stderr
    return done, {row["kernel"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize(
    ("kernel", "violation"),
    [
        ("spills", "bytes of registers, at most 0 are allowed"),
        ("greedy", "bytes of shared memory, sm_90 has 232448"),
        ("widens", "multiplies matrices of 16-bit elements without wgmma 16-bit"),
        ("no power of 2", "does not compile: "),
        (
            "incomplete",
            "does not compile: ValueError: the kernel takes x, out, V, stride, BLOCK, the variant names x, ",
        ),
    ],
)
def test_a_kernel_that_breaks_a_limit_is_named(kernel, violation, broken):
    done, rows = broken
    assert done.returncode == 1 and "5 of 8 kernels break a limit" in done.stderr
    (found,) = rows[kernel]["violations"]
    assert violation in found and found in done.stdout


def test_what_is_read_from_sound_kernels(broken):
    _, rows = broken
    sound, spills = rows["sound"], rows["spills"]
    assert sound["violations"] == [] and sound["matrix_instructions"] == {"wgmma 16-bit": 4}
    assert sound["dynamic_shared_bytes"] >= 2 * 64 * 64 * 2 and sound["static_shared_bytes"] == 0
    assert set(sound["global_loads"]) == {"16"}
    assert spills["stack_bytes"] and spills["spill_store_bytes"] and spills["spill_load_bytes"]
    assert set(rows["aligned"]["global_loads"]) == {"16"}
    assert max(map(int, rows["unaligned"]["global_loads"])) < 16


def test_loads_of_all_spellings():
    ptx = """
        ld.param.b64 %rd1, [kernel_param_0];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ], %rd4;
        ld.acquire.gpu.global.b32 %r1, [%rd1];
        @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
        @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    """
    assert compile.global_loads(ptx) == {"TMA": 1, "16": 3, "4": 2, "2": 1}


def test_spilled_bytes_of_all_widths():
    sass = """
        /*0010*/    STL [R1+0x4], R0 ;
        /*0020*/    @!P0 STL.64 [R1+0x8], R2 ;
        /*0030*/    LDL.LU.128 R4, [R1] ;
        /*0040*/    LDL.U8 R4, [R1] ;
        /*0050*/    LDG.E.128 R4, [R2.64] ;
    """
    assert compile.spill_bytes(sass) == {"STL": 12, "LDL": 17}


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compile"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_missing_triton_is_named(monkeypatch, capsys):
    monkeypatch.setattr(compile, "find_spec", lambda name: None)
    assert main(["compile"]) == 2
    assert "triton, which compiles the kernels, is not installed" in capsys.readouterr().err


def test_unknown_names_are_refused_with_the_known(tmp_path):
    done = run("--op", "softmax")
    assert done.returncode == 2 and "--op: got softmax, want some of " in done.stderr
    with pytest.raises(SystemExit):
        main(["compile", "--capability", "70"])
