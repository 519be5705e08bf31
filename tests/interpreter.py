"""Triton's interpreter without what it looks up or makes anew at each operation, which takes half of its time."""

import inspect
from functools import cache

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

np_dtype_of = getattr(interpreter, "_get_np_dtype", None)
np_dtypes = {}
patch_lang_of = getattr(interpreter, "_patch_lang", None)
patched = set()  # the packages in which the interpreter's own functions stand now


@cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def patch_builtin(package, builder, scope):
    """Its own looks at every member of a package, though what is no builtin at first never becomes one."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if core.is_builtin(member):  # not by the kernel that calls this function
            interpreter._patch_attr(package, name, member, builder, scope)


@cache
def packages_of(fn) -> frozenset:
    return frozenset(value for value in fn.__globals__.values() if value is tl or value is core)


class Scope:
    """What `patch_lang` changed, if anything."""

    def __init__(self, scope=None, packages=frozenset()):
        self.scope, self.packages = scope, packages

    def restore(self):
        if self.scope is not None:
            self.scope.restore()
            patched.difference_update(self.packages)


def patch_lang(fn):
    """Its own patches the packages of each function that a kernel calls, which the kernel has had patched."""
    missing = packages_of(fn) - patched
    if not missing:
        return Scope()
    scope = patch_lang_of(fn)
    patched.update(missing)
    return Scope(scope, missing)


def get_np_dtype(dtype):
    name = dtype.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = np_dtype_of(dtype)
    return np_dtypes[name]


def keep(cls, key_of, own):
    """Has objects of a class take all attributes but their `own`, which are given or follow, from the first of their key."""
    make, kept = cls.__init__, {}

    def init(self, *args):
        key = key_of(*args)
        if (like := kept.get(key)) is None:
            make(self, *args)
            kept[key] = {name: value for name, value in vars(self).items() if name not in own(*args)}
        else:
            vars(self).update(like, **own(*args))

    cls.__init__ = init
    return kept


def keep_types():
    """Types of blocks and what tensors take from them; blocks of a type have one shape, the same object."""
    shapes = {}  # by their identity, as numbers

    def key_of(element_ty, shape):
        return element_ty.name, shapes.get(id(shape)) or tuple(core._unwrap_shape(shape))

    types = keep(core.block_type, key_of, lambda element_ty, shape: {"element_ty": element_ty})
    make, equals = core.block_type.__init__, core.tuple.__eq__

    def init(self, element_ty, shape):
        make(self, element_ty, shape)
        if id(self.shape) not in shapes:
            _, numbers = key_of(element_ty, shape)
            same = next((one["shape"] for (_, other), one in types.items() if other == numbers))
            types[element_ty.name, numbers]["shape"] = self.shape = same
            shapes[id(same)] = numbers

    core.block_type.__init__ = init
    core.tuple.__eq__ = lambda self, other: core.constexpr(True) if other is self else equals(self, other)
    keep(
        core.tensor,
        lambda handle, type: id(type.shape) if type.is_block() else None,
        lambda handle, type: {"handle": handle, "type": type, "dtype": type.scalar},
    )


def keep_what_is_looked_up():
    """Leaves an interpreter that is not made of the functions replaced here, that of another version, as it is."""
    if np_dtype_of is None or patch_lang_of is None or not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
    interpreter._patch_lang = patch_lang
    keep_types()
