"""`python -m benchmarks compile`: every kernel compiled for GPUs that need not be there, and held to limits."""

from __future__ import annotations

import argparse
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks import results
from pmc_fast.doctor import usable_cpus
from pmc_fast.errors import UserError
from pmc_fast.outputs import check_file

if TYPE_CHECKING:
    from pmc_fast.kernels.variant import Variant

SCHEMA = "pmc_fast.benchmarks.compile/1"
MOST_SPILL_BYTES = 0  # stores and loads together, as many as stand in the code, however often they run
MOST_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that one block may have
MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}  # the fastest product of 16-bit operands
_RESERVED_SHARED_BYTES = {
    80: 0,
    90: 1024,
    100: 1024,
}  # the driver's own in kernels that use any, counted by cuobjdump but not in the limit

_LOAD = re.compile(r"\bld\.(?=[\w.:]*\bglobal\b)[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\s")
_ASYNC_LOAD = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
_TENSOR_LOAD = re.compile(r"\bcp\.async\.bulk\.tensor\S*\.global\b")
_MATRIX = re.compile(r"\b(?:(wgmma)\.mma_async|(tcgen05)\.mma|(mma)\.sync)([\w.:]*)")
_SPILL = re.compile(r"\b(STL|LDL)((?:\.\w+)*)\s")


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one kind of GPU; without numbers if it does not compile."""

    op: str
    kernel: str
    function: str
    capability: int
    num_warps: int
    num_stages: int
    matmul: bool
    registers: int = 0  # per thread
    spill_store_bytes: int = 0  # per thread
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    dynamic_shared_bytes: int = 0
    matrix_instructions: Mapping[str, int] = field(default_factory=dict)  # in the code, such as "wgmma 16-bit"
    global_loads: Mapping[str, int] = field(default_factory=dict)  # in the code, by bytes per thread, or "TMA"
    violations: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    known = list(MOST_SHARED_BYTES)
    parser.add_argument(
        "--capability",
        nargs="+",
        type=int,
        choices=known,
        default=known,
        metavar="CC",
        help=f"of the GPUs, of {', '.join(map(str, known))} (A100, H100, B200; default: all)",
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these files of kernels/ (default: all)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="each configuration for one of the GPUs in turn, and the first of each kernel for all",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")


def run(args: argparse.Namespace) -> None:
    """Print a table per kernel file and capability; raises Wrong if any kernel breaks a limit."""
    _require_compiler()
    if args.json:
        check_file(args.json, "--json")
    jobs = [
        (op, variant, capability)
        for op, module in kernel_files(args.op).items()
        for turn, capability in enumerate(args.capability)
        for variant in (
            quick(module, capability, turn, len(args.capability)) if args.quick else module.variants(capability)
        )
    ]
    if not jobs:
        raise UserError("there is nothing to compile: no file of kernels/ lists a variant")
    distinct = {_identity(job): job for job in jobs}  # models of different names may launch the same
    found: dict[str, Row] = {}
    with (
        ThreadPoolExecutor(usable_cpus()) as pool,  # both triton and its assembler leave Python's lock
        tqdm(total=len(distinct), unit="kernel", disable=None) as bar,
    ):
        for identity, row in zip(distinct, pool.map(lambda job: compiled(*job), distinct.values()), strict=True):
            found[identity] = row
            bar.update()
    rows = [replace(found[_identity(job)], op=job[0], kernel=job[1].name) for job in jobs]
    for _, group in groupby(rows, lambda row: (row.op, row.capability)):
        print(table(list(group)))
    if args.json:
        _write(args.json, rows, args.command_line)
    if bad := [row for row in rows if row.violations]:
        from benchmarks.bench import Wrong

        raise Wrong(f"{len(bad)} of {len(rows)} kernels break a limit")
    print(f"{len(rows)} kernels are within their limits. They were compiled, not run.")


def kernel_files(names: Sequence[str] | None = None) -> dict[str, ModuleType]:
    """The modules of pmc_fast.kernels that list variants of their own, by name; `names` picks some."""
    import pmc_fast.kernels

    prefix = pmc_fast.kernels.__name__ + "."
    modules = [import_module(found.name) for found in pkgutil.iter_modules(pmc_fast.kernels.__path__, prefix)]
    known = {
        module.__name__.removeprefix(prefix): module
        for module in modules
        if getattr(getattr(module, "variants", None), "__module__", None) == module.__name__
    }
    if unknown := set(names or ()) - set(known):
        raise UserError(f"--op: got {', '.join(sorted(unknown))}, want some of {', '.join(known)}")
    return {name: module for name, module in known.items() if names is None or name in names}


def quick(module: ModuleType, capability: int, turn: int, turns: int) -> list[Variant]:
    """Of what a kernel file lists the first variant of each kernel, and of the others those whose turn it is."""
    listed = module.variants(capability)
    first = {variant.kernel.__name__: number for number, variant in reversed([*enumerate(listed)])}
    return [v for number, v in enumerate(listed) if number % turns == turn or number == first[v.kernel.__name__]]


def _identity(job: tuple[str, Variant, int]) -> str:
    """What two jobs share that compile the same."""
    _, variant, capability = job
    return f"{capability} {replace(variant, name='')}"


def compiled(op: str, variant: Variant, capability: int) -> Row:
    """Compile one variant, read what came out, and hold it to the limits."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    described = (op, variant.name, variant.kernel.__name__, capability, *options.values(), variant.matmul)
    try:
        result = triton.compile(_source(variant), target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # of any kind: a mistake in the variant, a refusal or a crash of any stage of triton
        reason = " ".join(str(error).split())[-300:]
        return Row(*described, violations=(f"does not compile: {type(error).__name__}: {reason}",))
    ptx, usage = result.asm["ptx"], _resource_usage(result.asm["cubin"])
    spills = _spill_bytes(result.asm["cubin"]) if usage["STACK"] else Counter()
    row = Row(
        *described,
        registers=usage["REG"],
        spill_store_bytes=spills["STL"],
        spill_load_bytes=spills["LDL"],
        stack_bytes=usage["STACK"],
        static_shared_bytes=max(0, usage["SHARED"] - _RESERVED_SHARED_BYTES[capability]),
        dynamic_shared_bytes=result.metadata.shared,
        matrix_instructions=matrix_instructions(ptx),
        global_loads=global_loads(ptx),
    )
    sixteen_bit = any(kind in ("*bf16", "*fp16") for kind in variant.signature.values())
    return replace(row, violations=tuple(_violations(row, sixteen_bit)))


def _source(variant: Variant) -> object:
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    given = [*variant.signature, *variant.constants]
    if sorted(given) != sorted(names) or not set(variant.aligned) <= set(variant.signature):
        raise ValueError(f"the kernel takes {', '.join(names)}, the variant names {', '.join(given)}")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    return ASTSource(variant.kernel, signature, dict(variant.constants), attributes)


def _violations(row: Row, sixteen_bit: bool) -> list[str]:
    found = []
    if (spilled := row.spill_store_bytes + row.spill_load_bytes) > MOST_SPILL_BYTES:
        found.append(f"spills {spilled} bytes of registers, at most {MOST_SPILL_BYTES} are allowed")
    shared, most = row.static_shared_bytes + row.dynamic_shared_bytes, MOST_SHARED_BYTES[row.capability]
    if shared > most:
        found.append(f"needs {shared} bytes of shared memory, sm_{row.capability} has {most}")
    wanted = f"{MATRIX_INSTRUCTION[row.capability]} 16-bit"
    if row.matmul and sixteen_bit and not row.matrix_instructions.get(wanted):
        found.append(f"multiplies matrices of 16-bit elements without {wanted}")
    return found


def matrix_instructions(ptx: str) -> dict[str, int]:
    """How many instructions multiply matrices, by kind and by whether their operands are 16 bits wide."""
    found = Counter()
    for *kinds, rest in _MATRIX.findall(ptx):
        sixteen_bit = re.search(r"\.(bf16\.bf16|f16\.f16|kind::f16)\b", rest)
        found[f"{''.join(kinds)} {'16-bit' if sixteen_bit else 'other'}"] += 1
    return dict(found)


def global_loads(ptx: str) -> dict[str, int]:
    """How many instructions load from global memory, by the bytes that each loads per thread, widest first."""
    widths = Counter(int(vector or 1) * int(bits) // 8 for vector, bits in _LOAD.findall(ptx))
    widths.update(int(width, 0) for width in _ASYNC_LOAD.findall(ptx))
    tensors = len(_TENSOR_LOAD.findall(ptx))
    return {**({"TMA": tensors} if tensors else {}), **{str(width): widths[width] for width in sorted(widths)[::-1]}}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and others, as the assembler left them in the only function of `cubin`."""
    lines = [line for line in _inspect("cuobjdump", ["--dump-resource-usage"], cubin).splitlines() if "REG:" in line]
    (line,) = lines
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def _spill_bytes(cubin: bytes) -> Counter[str]:
    return spill_bytes(_inspect("nvdisasm", ["-c"], cubin))


def spill_bytes(sass: str) -> Counter[str]:
    """The bytes that all STL (store) and LDL (load) instructions move between registers and local memory."""
    found = Counter()
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    for instruction, modifiers in _SPILL.findall(sass):
        found[instruction] += next((widths[m] for m in modifiers.split(".") if m in widths), 4)
    return found


def _inspect(tool: str, options: Sequence[str], cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(rows: Sequence[Row]) -> str:
    """The rows of one kernel file and capability for reading."""
    width = max(len(row.kernel) for row in rows)
    head = f"{'registers':>11}{'spills':>11}{'stack':>7}{'shared':>10}  {'matrix products':22}global loads"
    lines = [f"{rows[0].op}  sm_{rows[0].capability}", f"  {'':{width}}{head}"]
    for row in rows:
        spills = f"{row.spill_store_bytes}/{row.spill_load_bytes}"
        shared = f"{row.static_shared_bytes}+{row.dynamic_shared_bytes}"
        products = ", ".join(f"{count} {kind}" for kind, count in row.matrix_instructions.items())
        loads = ", ".join(f"{n} x {w}{'' if w == 'TMA' else ' B'}" for w, n in row.global_loads.items())
        numbers = f"{row.registers:>11}{spills:>11}{row.stack_bytes:>7}{shared:>10}  {products:22}{loads}"
        lines.append(f"  {row.kernel:{width}}{numbers if row.registers else ''}".rstrip())
        lines += [f"    WRONG: {violation}" for violation in row.violations]
    return "\n".join(lines) + "\n"


def _write(path: Path, rows: Sequence[Row], command: str) -> None:
    import torch

    from benchmarks.measure import environment

    where = environment(torch.device("cpu"), seed=0)
    content = {
        "environment": {key: where[key] for key in ("platform", "versions", "commit", "started")},
        "limits": {"spill_bytes": MOST_SPILL_BYTES, "shared_bytes": MOST_SHARED_BYTES},
        "rows": [asdict(row) for row in rows],
        "command": command,
    }
    results.write(path, SCHEMA, content)


def _require_compiler() -> None:
    if find_spec("triton") is None:
        raise UserError("triton, which compiles the kernels, is not installed: `pip install triton`")
    from triton import knobs

    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled: unset it")
