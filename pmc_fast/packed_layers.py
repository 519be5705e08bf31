"""A packed batch through layers of a known kind on a CPU, by this library's own kernels in place of the model's modules."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pmc_fast import attention
from pmc_fast.attention import AttentionCall, PackedLengths
from pmc_fast.decoder_layers import Layer, Layers, LinearParts, NormParts, Unknown, is_hooked, read_layers
from pmc_fast.fast_linear import has_fast_bfloat16, has_library
from pmc_fast.layer_gradients import activated_product, add_and_normalize, normalize, products, rotate
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.ops import packed_attention
from pmc_fast.ops._autograd import in_transform
from pmc_fast.sharding import is_tensor_parallel

# What the attention of a model was seen to be given, layer by layer, while the model said so; None of models whose modules
# alone know what they do.
_seen: WeakKeyDictionary[LanguageModel, tuple[Hashable, list[AttentionCall] | None]] = WeakKeyDictionary()


def hidden_of(
    lm: LanguageModel, input_ids: Tensor, position_ids: Tensor, lengths: PackedLengths, rows: Tensor
) -> Tensor | None:
    """The last hidden states of these rows, [N, D], with gradients, or None if the model's modules have to make them.

    They have to on a GPU, where a part of the model is of no known kind, with dropout, gradient checkpointing or autocast, in
    transforms of torch.func, under torch.compile, and for bfloat16 on CPUs that multiply it faster than float32.

    Args:
        input_ids, position_ids: int64 [1, T] of a packed batch of these lengths.
        rows: int64 [N], each in [0, T).
    """
    if torch.compiler.is_compiling() or in_transform() or torch.is_autocast_enabled("cpu") or lm.device.type != "cpu":
        return None
    said, calls = _seen.get(lm, (None, None))
    if said != (says := _says(lm)):
        if not has_library() or is_hooked(lm) or is_tensor_parallel(lm.backbone):
            return None
        calls = _observed(lm)
        _seen[lm] = says, calls
    return None if calls is None else _hidden(lm, calls, input_ids, position_ids, lengths, rows)


def _hidden(
    lm: LanguageModel,
    calls: list[AttentionCall],
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: PackedLengths,
    rows: Tensor,
) -> Tensor | None:
    try:
        read = _read(lm, calls)
    except Unknown:
        return None
    return _forward(read, input_ids[0], position_ids[0], [lengths.shared, *lengths.own], rows)


def _says(lm: LanguageModel) -> Hashable:
    """What decides on what attention is given: numbers in the configuration and in the layers' attention; and the dtypes."""
    attentions = (getattr(layer, "self_attn", None) for layer in getattr(lm.backbone, "layers", ()))
    holders = (lm.model.config.get_text_config(), *attentions)
    numbers = (
        tuple((name, value) for name, value in vars(holder).items() if type(value) in (int, float))
        for holder in holders
        if holder is not None
    )
    return frozenset(parameter.dtype for parameter in lm.backbone.parameters()), *numbers


@torch.no_grad()
def _observed(lm: LanguageModel) -> list[AttentionCall] | None:
    """The attention calls of a small pass through the model's modules, if the layers as read here come to the same."""
    lengths = PackedLengths(0, (3, 2))
    ids, positions, rows = (torch.tensor(x, device="cpu") for x in ([[1, 2, 3, 1, 2]], [[0, 1, 2, 0, 1]], [1, 2, 4]))
    ids = ids % len(lm.head_module.weight)
    with evaluating(lm.model), attention.watching() as watched, attention.packed(lengths):
        expected = lm.hidden(ids, position_ids=positions, attention_mask=None, packed_lengths=lengths, use_cache=False)
        hidden = _hidden(lm, watched.calls, ids, positions, lengths, rows)
    windows = {call.window for call in watched.calls} - {None}
    if hidden is None or windows != watched.windows or watched.other_masks:
        return None
    # 16-bit modules round too much to tell: half of what they return was seen.
    exact = expected.dtype == torch.float32
    expected = expected[0, rows]
    same = not exact or (hidden - expected).abs().max() <= 1e-3 * expected.abs().max()
    return watched.calls if same else None


def _read(lm: LanguageModel, calls: list[AttentionCall]) -> Layers[NormParts, LinearParts]:
    """The model's layers, as they are now.

    Raises:
        Unknown: its modules have to be called.
    """
    if any(map(_has_more, lm.backbone.modules())):
        raise Unknown
    read = read_layers(lm, calls, lambda parts: parts, lambda parts: parts)
    dtypes = {parameter.dtype for parameter in lm.backbone.parameters()}
    if not dtypes <= {torch.float32, torch.bfloat16} or (torch.bfloat16 in dtypes and has_fast_bfloat16()):
        raise Unknown
    return read


def _has_more(module: nn.Module) -> bool:
    """Whether a module does more in training than its layers' parts tell."""
    drops = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
    drops = drops or getattr(module, "attention_dropout", 0)
    again = getattr(module, "gradient_checkpointing", False)
    return bool(module._backward_hooks or module._backward_pre_hooks or (module.training and (drops or again)))


def _forward(
    read: Layers[NormParts, LinearParts], input_ids: Tensor, position_ids: Tensor, lengths: list[int], rows: Tensor
) -> Tensor:
    dtype = read.embed.weight.dtype
    angles = list(zip(*read.angles(position_ids, dtype), strict=True))
    hidden, added = read.embed(input_ids), None
    for number, layer in enumerate(read.layers, 1):
        hidden, x = _input(layer.norm, hidden, added)
        attended = _attend(layer, x, angles[layer.rotary], lengths, read.head_dim)
        if number == len(read.layers):  # of the others nobody asks what comes after attention
            attended, hidden, x = (states.index_select(0, rows) for states in (attended, hidden, x))
        (output,) = products(attended, (layer.output,))
        output = _normalized(layer.output_norm, output)
        if layer.parallel:
            added = output + _mlp(layer, x)
        else:
            hidden, x = _input(layer.mlp_norm, hidden, output)
            added = _mlp(layer, x)
    return _input(read.final, hidden, added)[1].to(dtype)


def _input(norm: NormParts | None, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hidden states with what is added to them, and those normalised."""
    if norm is not None and added is not None:
        return add_and_normalize(hidden, added, norm)
    hidden = hidden if added is None else hidden + added
    return hidden, hidden if norm is None else normalize(hidden, norm)


def _normalized(norm: NormParts | None, x: Tensor) -> Tensor:
    return x if norm is None else normalize(x.reshape(-1, len(norm.weight)), norm).view(x.shape)


def _attend(
    layer: Layer[NormParts, LinearParts], x: Tensor, angles: tuple[Tensor, Tensor], lengths: list[int], head_dim: int
) -> Tensor:
    query, key, value = products(x, (layer.query, layer.key, layer.value))
    query, key = _normalized(layer.query_norm, query), _normalized(layer.key_norm, key)
    query, key, value = (states.view(len(x), -1, head_dim) for states in (query, key, value))
    query, key = rotate(query, *angles), rotate(key, *angles)
    call = layer.attention
    options = {"scale": call.scaling, "softcap": call.softcap, "window": call.window}
    return packed_attention(query, key, value, lengths, **options).flatten(1)


def _mlp(layer: Layer[NormParts, LinearParts], x: Tensor) -> Tensor:
    gate, up = products(x, (layer.gate, layer.up)) if layer.gate else (*products(x, (layer.up,)), None)
    return _normalized(layer.down_norm, activated_product(gate, layer.activation, up, layer.down))
