"""Decodes a model on a GPU from fixed memory: a step of so many rows is one CUDA graph.

A graph holds everything from the embedding of the last tokens to the record of the next ones, so a step costs the host one
launch. A row is a text that some answers say so far: of the graphs whose rows hold all texts the one of the fewest runs, and one of
fewer is made once it would have spared as much as it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.decoder_layers import Unknown
from pmc_fast.graph_rows import GraphRows
from pmc_fast.joint_linear import LEAST_STEPS
from pmc_fast.models import LanguageModel
from pmc_fast.modules import Modules
from pmc_fast.ops.sample import preferred
from pmc_fast.phases import phase
from pmc_fast.prefill import Prefill
from pmc_fast.static_layers import StaticLayers, read_in_place, read_static_layers
from pmc_fast.static_modules import StaticModules, check_modules, read_by_modules
from pmc_fast.static_rows import Sizes, StaticRows
from pmc_fast.warning import warn

if TYPE_CHECKING:
    from pmc_fast.pruning import Pruner

_capturing = Lock()  # of threads that decode different models one captures at a time: they have the same streams for it


def static_decoder(
    lm: LanguageModel,
    filled: Prefill,
    sizes: Sizes,
    ends: Tensor,
    draw: dict[str, Any],
    kept: KeptDecoders | None,
    modules: Modules,
) -> StaticDecoder | None:
    """A decoder for this model, or None where its kernels do not run or the model's modules cannot be captured.

    Layers of a known kind are run by kernels of our own, all others by their modules.

    Args:
        filled: a pass over some prompts, which shows how the model attends.
        ends: int64 [E], the tokens that end an answer.
        draw: the options of `linear_sample` but for sequence and position; the seed serves no decoder, but its `sample`.
        kept: holds decoders of an earlier call, of which one that fits serves again; None: this call has its own.
        modules: run a step of layers that are of no known kind.
    """
    device, dtype = filled.hidden.device.type, filled.hidden.dtype
    if lm.shards is not None:  # its ranks exchange between the head and the draw
        return None
    if not filled.suits_decode_attention or backend.choose("decode_attention", None, device, dtype) != "triton":
        return None
    prefer = preferred(device, draw["temperature"], draw["top_k"], draw["top_p"], draw["min_p"])
    if (impl := backend.choose("linear_sample", draw["impl"], device, dtype, prefer)) not in ("triton", "cuda"):
        return None
    copies = sizes.steps >= LEAST_STEPS
    try:
        reads, layers = _read(lm, filled, modules, copies)
    except Unknown:
        return None
    draw, keeps = {name: draw[name] for name in draw if name != "seed"} | {"impl": impl}, kept is not None
    sizes = sizes.rounded() if keeps else sizes

    def make() -> StaticDecoder | None:
        try:
            # In inference mode only calls in that mode could write to its memory.
            with torch.inference_mode(False), torch.no_grad():
                return StaticDecoder(lm, layers(filled, sizes, keeps), sizes, ends, draw)
        except Unknown:  # which modules show only when they run
            return None

    if kept is None:
        return make()
    bias = None if lm.head.bias is None else lm.head.bias.data_ptr()
    head = (lm.head.weight.data_ptr(), bias, lm.head.softcap, lm.head.logit_scale)
    precision = torch.backends.cuda.matmul.fp32_precision  # with which products were captured
    return kept.get((sizes, copies, tuple(ends.tolist()), *draw.items(), precision, *head, *reads), make)


def _read(
    lm: LanguageModel, filled: Prefill, modules: Modules, copies: bool
) -> tuple[Iterator[Hashable], Callable[..., StaticLayers | StaticModules]]:
    """What a step reads, and what makes the layers that do it, of filled, sizes and keeps. May raise Unknown."""
    try:
        layers = read_static_layers(lm, filled)
    except Unknown:
        check_modules(lm, filled)
        return read_by_modules(lm, filled), partial(StaticModules, lm, modules)
    return read_in_place(layers), partial(StaticLayers, layers, copies)


class KeptDecoders:
    """Those that the last call used, for the next one."""

    def __init__(self) -> None:
        self._earlier: dict[Hashable, StaticDecoder | None] = {}
        self._used: dict[Hashable, StaticDecoder | None] = {}

    @property
    def held_bytes(self) -> int:
        """Keys and values of the decoders that are kept, and copies of weights, which some share."""
        layers = [decoder.layers for decoder in self._used.values() if decoder is not None]
        joints = {joint for held in layers for joint in held.joints}
        return sum(held.held_bytes for held in layers) + sum(joint.copied_bytes for joint in joints)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call; what it does not use is gone afterwards."""
        self._earlier, self._used = self._used, {}
        try:
            yield
        finally:
            self._earlier = {}

    def get(self, key: Hashable, make: Callable[[], StaticDecoder | None]) -> StaticDecoder | None:
        if key not in self._used:
            decoder = self._earlier.pop(key, None)
            if decoder is None:
                self._earlier.clear()  # so that there is room: this call counts on it
                decoder = make()
            self._used[key] = decoder
        return self._used[key]


class StaticDecoder:
    """The layers of a model, memory for the rows of a sampling call, and a graph for each number of rows that ran.

    It reads the weights where they lie: they may change between calls, in place. See `static_decoder`.

    Attributes:
        captures: whether steps are graphs.
        name: see `Sampler.decoder`.
    """

    def __init__(
        self, lm: LanguageModel, layers: StaticLayers | StaticModules, sizes: Sizes, ends: Tensor, draw: dict[str, Any]
    ) -> None:
        self._lm, self.layers, self.sizes, head = lm, layers, sizes, lm.head
        self._rows = StaticRows(sizes, ends, layers.own)
        options = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale, **draw}
        self._linear_sample = backend.load("linear_sample", options.pop("impl"))
        self._draw_options = options
        self.captures, self.name = head.weight.is_cuda, layers.name
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # by rows; None: a step ran, which was not captured
        self._graph_rows, self._pool = GraphRows(sizes.rows), None

    def sample(
        self,
        filled: Prefill,
        sequence: Tensor,
        limit: Tensor,
        seed: int,
        prune: Pruner | None,
        progress: Callable[[int], object] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """Decode until no answer is left: tokens [answers, T], lengths, logprobs [answers, T], finished, pruned; and how many
        tokens went through the layers.

        Args:
            filled: the prompts' pass; each has the same number of answers.
            sequence, limit: int64 [answers].
        """
        self.layers.begin(filled)
        self._rows.begin(filled, sequence, limit, seed)
        self._draw(filled.hidden)
        counts = self._rows.counts(self._rows_for)
        for step in range(1, int(limit.max())):  # so many tokens are drawn
            if prune is not None and step % prune.interval == 0:
                with phase("prune"):
                    self._rows.prune(prune, step)
                counts.forget()
            texts, running = counts.latest()
            if running == 0:
                break
            with phase("decode"):
                self._advance(self._rows_for(texts))
            self._graph_rows.note(texts)
            counts.note()
            if progress:
                progress(running)
        return self._rows.results()

    def _rows_for(self, texts: int) -> int:
        """How many rows a step of so many texts has."""
        return self._graph_rows.of_graph(texts) if self.captures else self._graph_rows.fewest(texts)

    def _advance(self, rows: int) -> None:
        """One step: the first of so many rows compiles what has to be, a second one is captured, and then replayed."""
        if self.captures and rows in self._graphs:
            self._graphs[rows] = self._graphs[rows] or self._capture(rows)
        if (graph := self._graphs.setdefault(rows)) is not None:
            graph.replay()
        else:
            self._step(rows)

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """A graph of a step; None, and a warning, if torch cannot capture it: then all steps are launched one by one."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream is back even where the capture fails. Of streams, torch has one for all devices by default.
            # thread_local: other threads, which pin memory or watch collectives, may call CUDA meanwhile.
            with (
                _capturing,
                _own_workspaces(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=_capture_stream(self._lm.head.weight.device),
                    capture_error_mode="thread_local",
                ),
            ):
                self._step(rows)
        except RuntimeError as error:
            self.captures, self.name = False, "launches"
            warn(f"a decoding step cannot be captured as a CUDA graph, so it is slow: {error}")
            return None
        self._pool = graph.pool()
        return graph

    def _step(self, rows: int) -> None:
        self._draw(self.layers.hidden(self._rows, rows))

    def _draw(self, hidden: Tensor) -> None:
        """Draw the next token of each answer from its row's hidden state, and write down what became of them."""
        rows = self._rows
        draws = {"seed": rows.seed, "sequence": rows.sequence, "position": rows.step, "hidden_row": rows.row}
        token, logprob, *_ = self._linear_sample(hidden, self._lm.head.weight, **draws, **self._draw_options)
        self._rows.record(token, logprob)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Within a with block a graph's products take workspaces of its own memory, and later ones do not take these.

    cuBLAS keeps one for each stream, wherever the first product on it found memory: that of a graph which may be gone before the others.
    torch's compiler does the same (torch/_inductor/cudagraph_trees.py).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
