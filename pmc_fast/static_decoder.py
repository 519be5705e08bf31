"""Decodes a model of a known kind on a GPU from fixed memory: a step of so many rows is one CUDA graph.

A graph holds everything from the embedding of the last tokens to the record of the next ones, so a step costs the host one
launch. Rows that finish run on, unseen, until so many have that the others fit the graph of fewer rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.attention import AttentionCall
from pmc_fast.decoder_layers import Layers, LinearParts, NormParts, Unknown, read_layers
from pmc_fast.gpu.gemm import write_logits
from pmc_fast.models import LanguageModel
from pmc_fast.ops.sample import preferred
from pmc_fast.phases import phase
from pmc_fast.prefill import Prefill
from pmc_fast.side_by_side import side_by_side

if TYPE_CHECKING:
    from pmc_fast.pruning import Pruner

# Positions that are to be kept are allocated in multiples of this, so that calls of about the same lengths share graphs.
MULTIPLE = 32
LEAST_ROWS = 16  # of a graph
STEPS_AHEAD = 2  # of what the host knows: it never waits for the step under way
_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")  # whose angles depend on positions alone


@dataclass(frozen=True)
class Sizes:
    """What the fixed memory of a call is made for: `prompts` of up to `width` tokens, and `rows` of up to `steps` more."""

    rows: int
    prompts: int
    width: int
    steps: int

    def rounded(self) -> Sizes:
        """Those of calls that can share their memory with this one."""
        return replace(self, width=rounded(self.width), steps=rounded(self.steps))


def rounded(positions: int) -> int:
    return -(-positions // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class _Norm:
    parts: NormParts
    dtype: torch.dtype

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        return self._write(x, added, torch.empty(x.shape, dtype=self.dtype, device=x.device))

    def in_place(self, x: Tensor) -> None:
        self._write(x, None, x)

    def _write(self, x: Tensor, added: Tensor | None, out: Tensor) -> Tensor:
        part = self.parts
        normalize = _kernels("elementwise").normalize
        return normalize(x, part.weight, part.bias, part.epsilon, centered=part.centered, added=added, out=out)


@dataclass(frozen=True)
class _Linear:
    parts: LinearParts

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), len(self.parts.weight))
        write_logits(x, self.parts.weight, self.parts.bias, out)
        for down, up, scale in self.parts.adapters:
            out += scale * (x.to(down.dtype) @ down.T @ up.T)
        return out


def static_decoder(
    lm: LanguageModel,
    filled: Prefill,
    sizes: Sizes,
    ends: Tensor,
    draw: dict[str, Any],
    kept: KeptDecoders | None,
) -> StaticDecoder | None:
    """A decoder for this model, or None where its kernels do not run or one of the model's parts is of no known kind.

    Args:
        filled: a pass over some prompts, which shows how the model attends.
        ends: int64 [E], the tokens that end an answer.
        draw: the options of `linear_sample` but for sequence and position.
        kept: holds decoders of an earlier call, of which one that fits serves again; None: this call has its own.
    """
    device, dtype = filled.hidden.device.type, filled.hidden.dtype
    if lm.shards is not None:  # its ranks exchange between the head and the draw
        return None
    if not filled.suits_decode_attention or backend.choose("decode_attention", None, device, dtype) != "triton":
        return None
    prefer = preferred(device, draw["temperature"], draw["top_k"], draw["top_p"])
    if (impl := backend.choose("linear_sample", draw["impl"], device, dtype, prefer)) not in ("triton", "cuda"):
        return None
    try:
        layers = read_layers(lm, filled.calls, lambda parts: _Norm(parts, dtype), _Linear)
    except Unknown:
        return None
    if getattr(layers.rotary, "rope_type", None) not in _ROTARY_KINDS:
        return None
    draw = {**draw, "impl": impl}
    if kept is None:
        return StaticDecoder(lm, layers, sizes, ends, draw, keeps=False)
    sizes = sizes.rounded()
    key = (sizes, tuple(ends.tolist()), *draw.items(), *_read_in_place(lm, layers))
    return kept.get(key, lambda: StaticDecoder(lm, layers, sizes, ends, draw, keeps=True))


def _read_in_place(lm: LanguageModel, layers: Layers[_Norm, _Linear]) -> Iterator[float | None]:
    """Where the weights lie that a graph reads, and the numbers that it multiplies them with."""
    tensors = [layers.embed.weight, lm.head.weight, lm.head.bias]
    for part in chain([layers.final], *(vars(layer).values() for layer in layers.layers)):
        if isinstance(part, (_Norm, _Linear)):
            tensors += [part.parts.weight, part.parts.bias]
        if isinstance(part, _Linear):
            for down, up, scale in part.parts.adapters:
                tensors += [down, up]
                yield scale
    for tensor in tensors:
        yield None if tensor is None else tensor.data_ptr()


class KeptDecoders:
    """Those that the last call used, for the next one."""

    def __init__(self) -> None:
        self._earlier: dict[Hashable, StaticDecoder] = {}
        self._used: dict[Hashable, StaticDecoder] = {}

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call; what it does not use is gone afterwards."""
        self._earlier, self._used = self._used, {}
        try:
            yield
        finally:
            self._earlier = {}

    def get(self, key: Hashable, make: Callable[[], StaticDecoder]) -> StaticDecoder:
        if key not in self._used:
            self._used[key] = self._earlier.pop(key, None) or make()
        return self._used[key]


class StaticDecoder:
    """The layers of a model, memory for the rows of a sampling call, and a graph for each number of rows that ran.

    It reads the weights where they lie: they may change between calls, in place. See `static_decoder`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: Layers[_Norm, _Linear],
        sizes: Sizes,
        ends: Tensor,
        draw: dict[str, Any],
        keeps: bool,
    ) -> None:
        self._lm, self._layers, self.sizes, self._ends = lm, layers, sizes, ends
        options = {"bias": lm.head.bias, "softcap": lm.head.softcap, "logit_scale": lm.head.logit_scale, **draw}
        self._linear_sample = backend.load("linear_sample", options.pop("impl"))
        self._draw_options = options
        weight, rows = layers.embed.weight, sizes.rows
        self._device = weight.device
        kv_heads = len(layers.layers[0].key.parts.weight) // layers.head_dim

        def positions(count: int, length: int) -> Tensor:
            shape = (len(layers.layers), 2, count, kv_heads, length, layers.head_dim)
            return torch.empty(shape, dtype=weight.dtype, device=self._device)

        def counts(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=self._device)

        # Keys and values of each layer: the prompts', which are the prefill's own unless graphs are kept, and the rows'.
        self._kept_prefix = positions(sizes.prompts, sizes.width) if keeps else None
        self._prefix: Sequence[Sequence[Tensor]] = ()
        self._own = positions(rows, sizes.steps)
        self._cosine, self._sine = self._angles(sizes.width + sizes.steps)
        # By row, and moved with it:
        self._slot, self._sequence, self._prefix_row, self._first, self._token = (counts() for _ in range(5))
        self._position, self._step, self._running = counts(), counts(), counts(dtype=torch.bool)
        # By answer:
        self._limit, self._length, self._finished = counts(), counts(), counts(dtype=torch.bool)
        self._tokens = counts()[:, None].repeat(1, sizes.steps)
        self._logprobs = torch.zeros(rows, sizes.steps, device=self._device)
        self._alive = torch.zeros((), dtype=torch.int64, device=self._device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None

    def _angles(self, positions: int) -> list[Tensor]:
        """Cosines and sines of the rotary embedding, float32 [positions, R]."""
        like = self._layers.embed.weight[:1, :1]
        index = torch.arange(positions, device=self._device)[None]
        return [x[0].float().contiguous() for x in self._layers.rotary(like, position_ids=index)]

    def sample(
        self,
        filled: Prefill,
        sequence: Tensor,
        limit: Tensor,
        prune: Pruner | None,
        progress: Callable[[int], object] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Decode until no row is left: tokens [rows, T], lengths, logprobs [rows, T], finished, pruned.

        Args:
            filled: the prompts' pass; each has the same number of rows.
            sequence, limit: int64 [rows].
        """
        copies = self.sizes.rows // self.sizes.prompts
        hidden = filled.hidden.repeat_interleave(copies, dim=0)
        self._begin(filled, copies, sequence, limit)
        pruned = torch.zeros_like(self._finished)
        rows, steps = self.sizes.rows, int(limit.max())
        self._record(hidden, rows)
        alive = _Counts(self._alive)
        for step in range(1, steps):  # so many tokens are drawn
            if prune is not None and step % prune.interval == 0:
                self._prune(prune, rows, step, pruned)
                alive.forget()
            running = alive.latest()
            if running == 0:
                break
            if (fewer := self._graph_rows(rows, running)) < rows:
                with phase("retire"):
                    self._compact(rows, step)
                rows = fewer
            with phase("decode"):
                self._advance(rows)
            alive.note()
            if progress:
                progress(running)
        longest = int(self._length.max())
        results = (self._tokens[:, :longest], self._length, self._logprobs[:, :longest], self._finished)
        return *(result.clone() for result in results), pruned

    def _begin(self, filled: Prefill, copies: int, sequence: Tensor, limit: Tensor) -> None:
        """Everything as it is before the first draw. Prompts end where the prefix ends."""
        pad = self.sizes.width - filled.cache.get_seq_length()
        self._prefix = [layer.filled() for layer in filled.cache.layers]
        if self._kept_prefix is not None:
            for mine, its in zip(self._kept_prefix.flatten(0, 1), chain(*self._prefix), strict=True):
                mine[:, :, pad:] = its
            self._prefix = self._kept_prefix
        torch.arange(self.sizes.rows, out=self._slot)
        self._sequence.copy_(sequence)
        self._limit.copy_(limit)
        prompt = torch.arange(self.sizes.prompts, device=self._device)
        self._prefix_row.copy_(prompt.repeat_interleave(copies))
        self._first.copy_((filled.padding + pad).repeat_interleave(copies))
        self._position.copy_(filled.position.repeat_interleave(copies))
        self._step.zero_()
        self._running.fill_(True)
        self._length.zero_()
        self._finished.zero_()
        self._tokens.copy_(self._ends[0].expand_as(self._tokens))
        self._logprobs.zero_()

    def _graph_rows(self, rows: int, running: int) -> int:
        """How many rows the next step has: those of before, halved as often as those still running allow."""
        while rows > LEAST_ROWS and running <= (half := -(-rows // (2 * LEAST_ROWS)) * LEAST_ROWS) < rows:
            rows = half
        return rows

    def _advance(self, rows: int) -> None:
        """One step, replayed if it ran before. The first time does the step too, since it compiles what has to be."""
        if (graph := self._graphs.get(rows)) is not None:
            graph.replay()
            return
        self._step_of(rows)
        if self._device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, which pin memory or watch collectives, may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._step_of(rows)
            self._pool = graph.pool()
            self._graphs[rows] = graph

    def _step_of(self, rows: int) -> None:
        self._record(self._hidden(rows), rows)

    def _hidden(self, rows: int) -> Tensor:
        """The last hidden states [rows, D] of one more token per row, whose keys and values join the cache."""
        elementwise, kernel = _kernels("elementwise"), _kernels("decode_attention").decode_attention
        layers, dim = self._layers, self._layers.head_dim
        position, length, prefix_row = self._position[:rows], self._step[:rows], self._prefix_row[:rows]
        hidden = layers.embed(self._token[:rows]).float()
        first: dict[int | None, Tensor] = {None: self._first[:rows]}
        added = None
        for layer, (prefix_keys, prefix_values), own in zip(layers.layers, self._prefix, self._own, strict=True):
            keys, values = own[:, :rows]
            x = layer.norm(hidden, added)
            query, key, value = (
                part.view(rows, -1, dim) for part in side_by_side(x, (layer.query, layer.key, layer.value))
            )
            for states, norm in ((query, layer.query_norm), (key, layer.key_norm)):
                if norm is not None:
                    norm.in_place(states.view(-1, dim))
            turned = elementwise.rotate_and_append(
                query, key, value, self._cosine, self._sine, position, length, keys, values
            )
            call = layer.attention
            if call.window not in first:
                first[call.window] = torch.maximum(first[None], length + (self.sizes.width - call.window))
            attended = kernel(
                turned,
                keys,
                values,
                first[call.window],
                scale=_scale(call),
                softcap=call.softcap,
                prefix_key=prefix_keys,
                prefix_value=prefix_values,
                prefix_row=prefix_row,
                length=length,
            )
            added = layer.output(attended.flatten(1))
            if layer.gate is None:
                added += layer.down(elementwise.activate(layer.up(x), "gelu_tanh"))
            else:
                gate, up = side_by_side(layer.mlp_norm(hidden, added), (layer.gate, layer.up))
                added = layer.down(elementwise.activate(gate, "silu", up))
        return layers.final(hidden, added)

    def _record(self, hidden: Tensor, rows: int) -> None:
        """Draw each row's next token and write down what became of the rows."""
        token, logprob, *_ = self._linear_sample(
            hidden,
            self._lm.head.weight,
            sequence=self._sequence[:rows],
            position=self._step[:rows],
            **self._draw_options,
        )
        self._token[:rows].copy_(token)
        _kernels("append_token").append_token(
            token,
            logprob,
            self._slot[:rows],
            self._ends,
            self._limit,
            running=self._running[:rows],
            length=self._length,
            finished=self._finished,
            tokens=self._tokens,
            logprobs=self._logprobs,
            position=self._position[:rows],
            step=self._step[:rows],
        )
        self._alive.copy_(self._running[:rows].sum())

    def _prune(self, prune: Pruner, rows: int, step: int, pruned: Tensor) -> None:
        """Stop the answers that cannot be picked any more."""
        slot, running = self._slot[:rows], self._running[:rows]
        still = slot[running]
        lengths = self._length.index_copy(0, still, self._limit[still])
        with phase("prune"):
            stopped = prune(still, self._tokens[:, :step], lengths)
        if stopped is not None:
            pruned[still[stopped.to(self._device)]] = True
            running &= ~pruned[slot]
        self._alive.copy_(running.sum())

    def _compact(self, rows: int, step: int) -> None:
        """Bring the rows that run to the front."""
        source, destination, running = _retired(~self._running[:rows])
        held = step - 1  # the last token's keys and values come with the next step
        self._own[:, :, destination, :, :held] = self._own[:, :, source, :, :held]
        moved = (self._slot, self._sequence, self._prefix_row, self._first, self._token, self._position, self._running)
        for values in moved:
            values[destination] = values[source]
        self._running[running:] = False


def _retired(finished: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which unfinished rows to copy onto which finished ones so that the unfinished come first, and how many they are.

    Moves as few rows as possible: those at the end fill the holes before it.
    """
    rows = int((~finished).sum())
    holes = finished[:rows].nonzero()[:, 0]
    movers = (~finished[rows:]).nonzero()[:, 0] + rows
    return movers, holes, rows


class _Counts:
    """Reads how many rows run without waiting for the step under way: the number lags by up to STEPS_AHEAD steps."""

    def __init__(self, alive: Tensor) -> None:
        self._alive = alive
        self._noted: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._latest: int | None = None

    def forget(self) -> None:
        """The next number is to be exact."""
        self._noted.clear()
        self._latest = None

    def note(self) -> None:
        """After a step: its number is to be read later."""
        if self._alive.device.type == "cpu":
            self._latest = int(self._alive)
            return
        copy = torch.empty((), dtype=torch.int64, pin_memory=True)
        copy.copy_(self._alive, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._noted.append((copy, event))

    def latest(self) -> int:
        """Rows that ran STEPS_AHEAD steps ago, or now if nobody looked yet."""
        if self._latest is None:
            self._latest = int(self._alive)
        if len(self._noted) > STEPS_AHEAD:
            copy, event = self._noted.popleft()
            event.synchronize()
            self._latest = int(copy)
        return self._latest


def _scale(call: AttentionCall) -> float:
    return call.head_dim**-0.5 if call.scaling is None else call.scaling


def _kernels(name: str) -> Any:
    """A module of Triton kernels: imported where they run, since Triton need not be installed elsewhere."""
    return import_module(f"pmc_fast.kernels.{name}")
