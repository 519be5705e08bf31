"""One more token per row through a model's own modules, compiled by torch: all that surrounds attention becomes one graph.

Attention is an operator of which the compiler sees nothing but shapes. So is everything that grows or belongs to one call: who
attends, keys and values, their lengths. What is compiled reads only the weights, and serves later calls as they are then.
"""

from types import FunctionType

import torch
from torch import Tensor, nn

from pmc_fast import attention
from pmc_fast.cache import SampleCache
from pmc_fast.decoder_layers import is_hooked
from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel
from pmc_fast.modules import Modules, last_hidden
from pmc_fast.prefill import Prefill
from pmc_fast.sharding import is_tensor_parallel

NAME = "pmc_fast_compiled"  # of attention; a compiler cannot ask a ContextVar, as `attention.NAME` does, who attends


class CompiledModules(Modules):
    """Those of a model, compiled at the first token: for any number of rows above 1, and for a single row. See `Modules`."""

    name, compiled = "compiled modules", True

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(lm)
        # Of a function's code torch keeps a few compilations, and then refuses more: each model has code of its own.
        code = FunctionType(last_hidden.__code__.replace(), last_hidden.__globals__)
        self._last_hidden = torch.compile(code, fullgraph=True, dynamic=True)

    def check(self, filled: Prefill) -> None:
        got = None
        if is_hooked(self._lm):  # torch does not look again whether there are any
            got = "a model with hooks or replaced forwards"
        elif is_tensor_parallel(self._lm.backbone):
            got = "a tensor-parallel model"
        elif not isinstance(filled.cache, SampleCache):
            got = "a model that keeps more than keys and values"
        elif not filled.suits_decode_attention:
            got = "a model whose attention is not torch's SDPA, or has masks that are more than causal and a window"
        if got is not None:
            raise UserError(f"compile_modules: got {got}; expected compile_modules=False for it")

    def hidden(self, token: Tensor, position: Tensor, rows: attention.Decoding, held: int | Tensor) -> Tensor:
        """See `Modules.hidden`.

        Raises:
            UserError: the modules cannot be compiled.
        """
        if not isinstance(held, Tensor):  # not a constant to compile for
            held = torch.full((), held, device=token.device)
        _register()
        try:
            with attention.implemented_by(NAME, self._lm.model):
                return super().hidden(token, position, rows, held)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise UserError(
                "compile_modules: got a model that has changed more often than torch compiles one function anew "
                "(torch._dynamo.config.recompile_limit); expected a new Sampler for it"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            name, reason = type(self._lm.backbone).__name__, " ".join(" ".join(str(error).splitlines()[:2]).split())
            raise UserError(
                f"compile_modules: got {name}, which torch cannot compile ({reason}); expected compile_modules=False for it"
            ) from error


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args, **kwargs) -> None: ...


def _forward(
    module: nn.Module,
    query: Tensor,  # [rows, heads, 1, head_dim]
    key: Tensor,  # [rows, kv_heads, 1, head_dim]
    value: Tensor,
    attention_mask: None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    token = (states[:, :, 0] for states in (query, key, value))
    return _attend_new_token(*token, module.layer_idx, sliding_window, scaling, softcap)[:, None], None


@torch.library.custom_op("pmc_fast::attend_new_token", mutates_args=())  # what it changes no graph holds
def _attend_new_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    return attention.attend(layer, query, key, value, window=window, scale=scale, softcap=softcap)


@_attend_new_token.register_fake
def _(query, *args):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
