"""Triton's interpreter without what it does anew at each call of a kernel's function: half of its time."""

import inspect
from functools import cache

from triton.language import core
from triton.runtime import interpreter


@cache
def _builtins(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _patch_builtin(package, builder, scope):
    """Its own looks at every member of a package; what is no builtin at first never becomes one."""
    for name in _builtins(package):
        member = getattr(package, name)
        if core.is_builtin(member):  # not by the kernel that calls this function
            interpreter._patch_attr(package, name, member, builder, scope)


def keep_what_is_looked_up():
    interpreter._patch_builtin = _patch_builtin
