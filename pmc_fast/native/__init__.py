"""The C++ implementations: tensors to addresses and sizes. The only importer of pmc_fast._C."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pmc_fast.errors import BackendUnavailable


@cache
def library() -> ModuleType:
    """The compiled module.

    Raises:
        BackendUnavailable: it is missing or cannot be loaded, with what to do about it.
    """
    try:
        from pmc_fast import _C
    except ImportError as error:
        package = Path(__file__).resolve().parents[1]
        if (package.parent / "CMakeLists.txt").exists():
            raise BackendUnavailable(
                f"pmc_fast was imported from its source tree, {package.parent}, which holds no compiled module "
                "(an installed copy is hidden while Python runs from there): run `pip install -e .` in it, or run "
                "from another folder"
            ) from error
        raise BackendUnavailable(f"the compiled module pmc_fast._C cannot be loaded: {error}") from error
    try:
        _C.instruction_set()
    except ValueError as error:
        raise BackendUnavailable(str(error)) from error
    return _C


def address(tensor: Any) -> int:
    """Where a tensor's values lie; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(dtype: object) -> int:
    """The compiled module's number for a torch dtype."""
    return {"torch.float32": library().FLOAT32, "torch.bfloat16": library().BFLOAT16}[str(dtype)]
