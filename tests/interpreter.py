"""Triton's interpreter without what it looks up anew at each call of a kernel's function, which takes two fifths of its time."""

import inspect
from functools import cache

from triton.language import core
from triton.runtime import interpreter

np_dtype_of = getattr(interpreter, "_get_np_dtype", None)
np_dtypes = {}


@cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def patch_builtin(package, builder, scope):
    """Its own looks at every member of a package, though what is no builtin at first never becomes one."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if core.is_builtin(member):  # not by the kernel that calls this function
            interpreter._patch_attr(package, name, member, builder, scope)


def get_np_dtype(dtype):
    name = dtype.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = np_dtype_of(dtype)
    return np_dtypes[name]


def keep_what_is_looked_up():
    """Leaves an interpreter that is not made of the functions replaced here, that of another version, as it is."""
    if np_dtype_of is None or not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
