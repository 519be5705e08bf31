"""A packed batch through layers of a known kind, by this library's own kernels in place of the model's modules."""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pmc_fast import attention, backend, varlen
from pmc_fast.attention import AttentionCall, PackedLengths
from pmc_fast.cache import SampleCache
from pmc_fast.decoder_layers import Unknown, is_hooked, read_layers
from pmc_fast.fast_linear import has_fast_bfloat16
from pmc_fast.layer_gradients import activate, add_and_normalize, normalize, products, rotate
from pmc_fast.layer_kinds import attentions_of, with_one_layer
from pmc_fast.layer_parts import Embedding, Layer, Layers, LinearParts, NormParts
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.ops import packed_attention
from pmc_fast.ops._autograd import in_transform
from pmc_fast.sharding import is_tensor_parallel

# Whose kernels run the layers, by the kind of device. Triton's have not yet run on a GPU: {"cuda": "triton"} has them tried.
KERNELS = {"cpu": "native"}

# What the attention of a model was seen to be given, layer by layer, while the model said so, and whether its layers as read here
# come to what its modules do; None while a part of it is unknown, which an adapter may have been.
_seen: WeakKeyDictionary[LanguageModel, tuple[Hashable, list[AttentionCall], bool | None]] = WeakKeyDictionary()

# By how much a layer with 16-bit modules may differ in a row: each of a dozen results in it is rounded by up to 2^-9 of its size.
# The families that are tested stay below half of it.
ROUNDED = 2**-4

# What modules call the shares that they drop in training, where no module of its own does.
_DROPS = ("attention_dropout", "dropout", "embedding_dropout", "layerdrop", "residual_dropout")


def hidden_of(
    lm: LanguageModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: PackedLengths,
    rows: Tensor,
    cache: SampleCache | None = None,
) -> Tensor | None:
    """The last hidden states of these rows, [N, D], with gradients, or None if the model's modules have to make them.

    They have to where a part of the model is of no known kind, with dropout, gradient checkpointing or autocast, in
    transforms of torch.func, under torch.compile, for bfloat16 on CPUs that multiply it faster than float32, and where KERNELS
    has none for the device or these do not take what the model is made of (see `_read`) or a beginning that is held once.

    Args:
        input_ids, position_ids: int64 [1, T] of a packed batch of these lengths.
        rows: int64 [N], each in [0, T).
        cache: an empty one of T positions, which then holds the keys and values of all tokens in the model's dtype.
    """
    device = lm.device.type
    if device not in KERNELS or (lengths.shared and KERNELS[device] == "triton"):
        return None
    if torch.compiler.is_compiling() or in_transform() or torch.is_autocast_enabled(device):
        return None
    said, calls, same = _seen.get(lm, (None, [], None))
    if said != (says := _says(lm)) or (same is None and _is_known(lm, calls)):
        if not _has_kernels(device) or is_hooked(lm) or is_tensor_parallel(lm.backbone):
            return None
        calls, same = _observed(lm)
        _seen[lm] = says, calls, same
    return _hidden(lm, calls, input_ids, position_ids, lengths, rows, cache) if same else None


def attention_calls(lm: LanguageModel) -> list[AttentionCall]:
    """What the layers' attention is given, of a model whose layers `hidden_of` has run."""
    return _seen[lm][1]


def _hidden(
    lm: LanguageModel,
    calls: list[AttentionCall],
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: PackedLengths,
    rows: Tensor,
    cache: SampleCache | None = None,
) -> Tensor | None:
    try:
        read = _read(lm, calls)
    except Unknown:
        return None
    with torch.cuda.device_of(input_ids):  # Triton launches on the current one
        return _forward(read, input_ids[0], position_ids[0], lengths, rows, cache)


def _has_kernels(device: str) -> bool:
    return (backend.missing_library() if KERNELS[device] == "native" else backend.missing_triton()) is None


def _says(lm: LanguageModel) -> Hashable:
    """What decides on what attention is given: numbers in the configuration and in the layers' attention; and the dtypes."""
    holders = (lm.model.config.get_text_config(), *attentions_of(lm.backbone))
    numbers = (
        tuple((name, value) for name, value in vars(holder).items() if type(value) in (int, float))
        for holder in holders
    )
    return frozenset(parameter.dtype for parameter in lm.backbone.parameters()), *numbers


def _is_known(lm: LanguageModel, calls: list[AttentionCall]) -> bool:
    try:
        return _read(lm, calls) is not None
    except Unknown:
        return False


@torch.no_grad()
def _observed(lm: LanguageModel) -> tuple[list[AttentionCall], bool | None]:
    """The attention calls of a small pass through the model's modules, and whether the layers as read here come to the same."""
    lengths = PackedLengths(0, (3, 2))
    ids, positions, rows = (
        torch.tensor(x, device=lm.device) for x in ([[1, 2, 3, 1, 2]], [[0, 1, 2, 0, 1]], [1, 2, 4])
    )
    ids = ids % len(lm.head_module.weight)

    def passed(lm: LanguageModel) -> tuple[attention.Watched, Tensor]:
        with attention.watching() as watched, attention.packed(lengths):
            options = {"position_ids": positions, "attention_mask": None, "packed_lengths": lengths}
            return watched, lm.hidden(ids, **options)[0, rows]

    with lm.turn, evaluating(lm.model):
        watched, expected = passed(lm)
        if not _is_known(lm, watched.calls):
            return watched.calls, None
        if {call.window for call in watched.calls} - {None} != watched.windows or watched.other_masks:
            return watched.calls, False
        if {parameter.dtype for parameter in lm.backbone.parameters()} == {torch.float32}:
            hidden = _hidden(lm, watched.calls, ids, positions, lengths, rows)
            return watched.calls, bool((hidden - expected).abs().max() <= 1e-3 * expected.abs().max())
        # What many layers make of roundings may be anything, so here one shows what the layers' classes do.
        one = copy(lm)
        one.backbone = with_one_layer(lm.backbone)
        _, expected = passed(one)
        hidden = _hidden(one, watched.calls[:1], ids, positions, lengths, rows)
    error = (hidden.float() - expected.float()).norm(dim=-1)
    return watched.calls, hidden.dtype == expected.dtype and bool(
        (error <= ROUNDED * expected.float().norm(dim=-1)).all()
    )


def _read(lm: LanguageModel, calls: list[AttentionCall]) -> Layers[NormParts, LinearParts]:
    """The model's layers, as they are now.

    Raises:
        Unknown: its modules have to be called.
    """
    if any(map(_has_more, lm.backbone.modules())):
        raise Unknown
    read = read_layers(lm, calls, lambda parts: parts, lambda parts: parts)
    if not (_native_takes(lm) if KERNELS[lm.device.type] == "native" else _triton_takes(read)):
        raise Unknown
    return read


def _native_takes(lm: LanguageModel) -> bool:
    dtypes = {parameter.dtype for parameter in lm.backbone.parameters()}
    return dtypes <= {torch.float32, torch.bfloat16} and not (torch.bfloat16 in dtypes and has_fast_bfloat16())


def _triton_takes(read: Layers[NormParts, LinearParts]) -> bool:
    """Whether adapters aside all is of one dtype, for which there is attention over a packed batch in one call."""
    parts = [read.embed, read.final, *(part for layer in read.layers for part in vars(layer).values())]
    weights = [part.weight for part in parts if isinstance(part, (Embedding, NormParts, LinearParts))]
    like, softcaps = weights[0], {layer.attention.softcap for layer in read.layers}
    one_dtype = {weight.dtype for weight in weights} == {like.dtype}
    return one_dtype and all(varlen.takes(like.device, like.dtype, read.head_dim, softcap) for softcap in softcaps)


def _has_more(module: nn.Module) -> bool:
    """Whether a module does more in training than its layers' parts tell."""
    drops = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
    drops = drops or any(isinstance(share := getattr(module, name, 0), (int, float)) and share for name in _DROPS)
    again = getattr(module, "gradient_checkpointing", False)
    return bool(module._backward_hooks or module._backward_pre_hooks or (module.training and (drops or again)))


def _forward(
    read: Layers[NormParts, LinearParts],
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: PackedLengths,
    rows: Tensor,
    cache: SampleCache | None,
) -> Tensor:
    dtype = read.embed.weight.dtype
    angles = list(zip(*read.angles(position_ids, dtype), strict=True))
    hidden, added = read.embed(input_ids, position_ids), None
    kind = hidden.dtype if KERNELS[hidden.device.type] == "native" else dtype  # of what is multiplied
    for number, layer in enumerate(read.layers, 1):
        hidden, x = _input(layer.norm, hidden, added, kind)
        query, key, value = _heads(layer, x, angles[layer.rotary], read.head_dim)
        if cache is not None:
            cache.update(*(states.transpose(0, 1)[None].to(dtype) for states in (key, value)), number - 1)
        attended = _attend(layer.attention, query, key, value, lengths)
        if number == len(read.layers):  # of the others nobody asks what comes after attention
            attended, hidden, x = (states.index_select(0, rows) for states in (attended, hidden, x))
        (output,) = products(attended, (layer.output,))
        output = _normalized(layer.output_norm, output)
        if layer.parallel:
            added = output + _mlp(layer, x if layer.mlp_norm is None else normalize(hidden, layer.mlp_norm))
        else:
            hidden, x = _input(layer.mlp_norm, hidden, output, kind)
            added = _mlp(layer, x)
    return _input(read.final, hidden, added, dtype)[1].to(dtype)


def _input(norm: NormParts | None, hidden: Tensor, added: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The hidden states with what is added to them, and those normalised, to be multiplied in this dtype."""
    if norm is not None and added is not None:
        return add_and_normalize(hidden, added, norm)
    hidden = hidden if added is None else hidden + added
    return hidden, hidden.to(kind) if norm is None else normalize(hidden, norm)


def _normalized(norm: NormParts | None, x: Tensor) -> Tensor:
    return x if norm is None else normalize(x.reshape(-1, len(norm.weight)), norm).view(x.shape)


def _heads(
    layer: Layer[NormParts, LinearParts], x: Tensor, angles: tuple[Tensor, Tensor], head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the rows, [N, heads, head_dim]."""
    parts, norms = (layer.query, layer.key, layer.value), (layer.query_norm, layer.key_norm, None)
    states = products(x, [part for part in parts if part is not None])
    if layer.clip is not None:
        states = [made.clamp(-layer.clip, layer.clip) for made in states]
    states = [_normalized(norm, made) for norm, made in zip(norms, states, strict=False)]
    query, key, value = layer.heads(states, head_dim)
    if angles[0].shape[1]:
        query, key = rotate(query, *angles), rotate(key, *angles)
    return query, key, value


def _attend(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths) -> Tensor:
    options = {"scale": call.scaling, "softcap": call.softcap, "window": call.window}
    if KERNELS[query.device.type] == "triton":
        return varlen.attend(query, key, value, lengths.own, **options).flatten(1)
    return packed_attention(query, key, value, [lengths.shared, *lengths.own], **options).flatten(1)


def _mlp(layer: Layer[NormParts, LinearParts], x: Tensor) -> Tensor:
    gate, up = products(x, (layer.gate, layer.up)) if layer.gate else (*products(x, (layer.up,)), None)
    activated = activate(gate, layer.activation, up)
    del gate, up  # without gradients nobody else holds them
    (down,) = products(activated, (layer.down,))
    return _normalized(layer.down_norm, down)
