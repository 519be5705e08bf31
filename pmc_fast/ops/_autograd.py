"""What the ops share of derivatives: once, in reverse mode; whatever else would be silently wrong is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiable(op: Callable, name: str, save: Callable, backward: Callable) -> Callable:
    """Registers the gradients of a custom op's first output; returns the op for callers that may be in a transform.

    save, backward: as `torch.library.register_autograd` wants them; save keeps the inputs, too, that a second derivative would
    be of, since `once` needs them. In a transform all outputs are differentiable, so that
    backward can tell by their upstream gradients that its own result is being differentiated.
    """

    def save_one(ctx, inputs, output):
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    def backward_once(ctx, *upstream):
        # Looked up before backward runs: that may scale in place what it saved.
        of = (*upstream, *ctx.saved_tensors) if torch.is_grad_enabled() else ()
        return once(name, backward(ctx, *upstream), of)

    op.register_autograd(backward_once, setup_context=save_one)
    return _transformable(op, name, save, backward)


def not_differentiable(op: Callable, name: str, reason: str) -> Callable:
    """Likewise of a custom op that has no gradients: asking for them raises `reason`."""

    def save(ctx, inputs, output):
        pass

    def backward(ctx, *upstream):
        raise NotImplementedError(reason)

    op.register_autograd(backward, setup_context=save)
    return _transformable(op, name, save, backward)


def only_once(name: str) -> str:
    return (
        f"{name}: its gradients have no derivatives; for second-order derivatives write it in plain torch, as its docstring "
        "does, or leave out create_graph=True"
    )


def once(
    name: str, gradients: tuple[Tensor | None, ...], of: Sequence[Tensor | None] = ()
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns, such that to differentiate it again raises.

    torch's `once_differentiable` lets gradients pass as constants if the upstream one is a constant, as that of a loss is.

    of: what the gradients depend on. Without it in the graph, a caller that allows for unused inputs, as
    `torch.autograd.functional.hessian` does, would get zeros instead of the error.
    """
    if not torch.is_grad_enabled():  # create_graph=False
        return gradients
    depends = [x for x in of if x is not None and x.requires_grad]
    raising = torch._C._functions.DelayedError(only_once(name).encode(), len(gradients) + len(depends))
    outputs = raising(*(None if g is None else g.detach().requires_grad_() for g in gradients), *depends)
    return tuple(outputs[: len(gradients)])


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _transformable(op: Callable, name: str, save: Callable, backward: Callable) -> Callable:
    """The op, within an autograd.Function where torch.func or forward mode is at work.

    There `grad` refuses custom ops, and forward mode drops their tangents without a word. Elsewhere torch.compile would have
    to trace a Function, but takes a custom op as it is.
    """

    def call(*args):
        if not in_transform():
            return op(*args)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # it cannot trace this: what it compiles then runs as it is
        return function.apply(*args)

    def jvp(ctx, *tangents):
        raise NotImplementedError(f"{name}: has no forward-mode derivatives (jvp, jacfwd, hessian)")

    def vmap(info, in_dims, *args):
        def pick(x, dim, i):
            return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

        def without_values(x, dim):
            if not isinstance(x, Tensor):
                return x
            return x.new_empty(x.shape if dim is None else [*x.shape[:dim], *x.shape[dim + 1 :]], device="meta")

        if info.batch_size:
            found, join = [call(*map(pick, args, in_dims, repeat(i))) for i in range(info.batch_size)], torch.stack
        else:  # whose results have shapes all the same
            found = [call(*map(without_values, args, in_dims))]
            join = lambda outputs: outputs[0].new_empty(0, *outputs[0].shape, device=args[0].device)  # noqa: E731
        if isinstance(found[0], Tensor):
            return join(found), 0
        outputs = tuple(map(join, zip(*found, strict=True)))
        return outputs, (0,) * len(outputs)

    methods = {
        "forward": lambda *args: op(*args),
        "setup_context": save,
        "backward": backward,
        "jvp": jvp,
        "vmap": vmap,
    }
    function = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})
    return call
