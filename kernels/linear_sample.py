"""The output head and `sample` in one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu.gemm import even_pieces, padded_rows, row_major, write_product
from pmc_fast.kernels.device import dot_precision
from pmc_fast.kernels.draw import PARTS, Parts, draw_from_all, draw_from_tile, finish_draw, store_part
from pmc_fast.kernels.interpreted import dot
from pmc_fast.kernels.logits import Head, head_logit
from pmc_fast.kernels.philox import block_words
from pmc_fast.kernels.sampling import NOISE_OF_A_GRAPH, Draws, Sampling
from pmc_fast.kernels.truncate import draw_truncated
from pmc_fast.kernels.variant import MODELS, Model, Variant, absent, present
from pmc_fast.phases import phase

SCRATCH_BYTES = 1 << 29  # of logits held at once
# Up to so many rows the fused kernel is the faster one. On an H200 it takes 220 and 244 us for 16 and 32 rows of Llama-3.2-3B's head,
# and torch's product and `draw_from_all` 277 for 64; 52 and 74 of SmolLM2-135M's, and these 60 for 64. With 32 rows they have not been
# timed.
FUSED_ROWS = 16
PIECE = tl.constexpr(16)  # rows that a program draws for together


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int | Tensor,
    sequence: Tensor,
    position: Tensor,
    hidden_row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that several draws are from are multiplied once, and with truncation their groups are measured once.

    A seed that is an int64 [1] is read by the kernels, so that a CUDA graph of them draws by the seed of the time.
    """
    head = Head(None if bias is None else bias.contiguous(), None if logit_scale == 1 else logit_scale, softcap)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, sequence, position)
    rows, vocab = len(sequence), len(weight)
    fused = rows <= FUSED_ROWS and not sampling.truncates(vocab)
    at_once = max(1, SCRATCH_BYTES // (4 * vocab))
    if hidden_row is not None and not fused and len(hidden) < rows and len(hidden) <= at_once:
        sampling = sampling._replace(logits_row=hidden_row.contiguous())
    elif hidden_row is not None:
        hidden = hidden[hidden_row]
    hidden, weight = row_major(hidden), row_major(weight)
    draws = Draws.empty(rows, hidden.device)
    if sampling.logits_row is not None:
        _draw_from_products(hidden, weight, head, sampling, draws)
    elif not fused:
        for piece in even_pieces(rows, at_once):
            _draw_from_products(hidden[piece], weight, head, sampling.rows(piece), draws.rows(piece))
    elif rows:
        _draw_fused(hidden, weight, head, sampling, draws)
    return draws.checked("linear_sample")


def _draw_from_products(hidden: Tensor, weight: Tensor, head: Head, sampling: Sampling, draws: Draws) -> None:
    """The product goes to float32 scratch through torch; `sample`'s kernels read it, applying bias, scale and soft cap.

    Where something is truncated, another pass over the head would cost more than the 8 V bytes a row.
    """
    with phase("head"):
        logits = padded_rows(len(hidden), len(weight), torch.float32, hidden.device)
        write_product(logits, hidden, weight.T)
    draw = draw_truncated if sampling.truncates(len(weight)) else draw_from_all
    with phase("sample"):
        draw(logits, head, sampling, draws)


def _draw_fused(hidden: Tensor, weight: Tensor, head: Head, sampling: Sampling, draws: Draws) -> None:
    """Few rows of which nothing is truncated, or greedy.

    `head_draw_kernel` multiplies a tile of the head by a tile of rows, turns the product into logits in registers and
    leaves of each row its maximum, masses and winner, 20 bytes for a tile of tokens; `sample`'s reduction finishes. The
    head is read once from memory, V D s bytes for V tokens, D dimensions and elements of s bytes, since the programs
    that share a tile of it are neighbours; logits are never written.
    """
    (rows, dim), vocab = hidden.shape, len(weight)
    tiles = tiles_for(rows, dim, hidden.dtype.itemsize)
    with phase("head"):
        parts = Parts.empty(rows, triton.cdiv(vocab, tiles.vocab), hidden.device)
        head_draw_kernel[(parts.tiles * triton.cdiv(rows, tiles.rows),)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            rows,
            vocab,
            dim,
            *head,
            sampling.temperature,
            sampling.inverse_temperature,
            *sampling.noise(),
            *parts,
            GREEDY=sampling.greedy,
            TEMPERED=sampling.tempered,
            PRECISION=dot_precision(),
            VOCAB_TILE=tiles.vocab,
            ROW_TILE=tiles.rows,
            DIM_TILE=tiles.dim,
            WHOLE=dim % tiles.dim == 0,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    with phase("sample"):
        finish_draw(parts, sampling, draws)


class Tiles(NamedTuple):
    """What a program multiplies, and with how many warps and pipeline stages."""

    vocab: int
    rows: int
    dim: int
    warps: int
    stages: int


def tiles_for(rows: int, dim: int, bytes_per_element: int) -> Tiles:
    """The head on the large side of the product: there are few rows."""
    row_tile = min(max(16, triton.next_power_of_2(rows)), 32)
    dim_tile = min(32 if bytes_per_element == 4 else 64, max(16, triton.next_power_of_2(dim)))
    return Tiles(128, row_tile, dim_tile, 4, 4)


@triton.jit
def tile_token(first, TOKENS: tl.constexpr):
    """The token that each row of a tile stands for.

    In order they would lie in different threads of a matrix product. In this order the thread that holds a row also holds
    those TOKENS / 2 and 8 further on, and the four are the tokens that share a Philox block.
    """
    row = tl.arange(0, TOKENS)
    half: tl.constexpr = TOKENS // 2
    return first + (row % half // 16 * 8 + row % 8) * 4 + row // half * 2 + row // 8 % 2


@triton.jit
def words_of_tile(seed_low, seed_high, sequence, position, first, TOKENS: tl.constexpr):
    """uint32 [TOKENS, rows]: the words of `tile_token`'s tokens; sequence, position: uint32 [rows]."""
    rows: tl.constexpr = sequence.shape[0]
    block = first // 4 + tl.arange(0, TOKENS // 4)
    block = tl.broadcast_to(block.to(tl.uint32)[:, None], [TOKENS // 4, rows])
    w0, w1, w2, w3 = block_words(seed_low, seed_high, sequence[None, :], position[None, :], block)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [blocks, rows, word % 2, word // 2]
    words = words.reshape(TOKENS // 32, 8, rows, 2, 2)
    return words.permute(4, 0, 3, 1, 2).reshape(TOKENS, rows)


@triton.jit
def record(
    product,  # float32 [tokens, rows]
    first,
    first_row,
    rows,
    vocab,
    tile,
    head,
    sampling,
    parts,
    tiles,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """Draws from a tile, few rows at a time: what a thread holds besides the product is in proportion."""
    TOKENS: tl.constexpr = product.shape[0]
    ROWS: tl.constexpr = product.shape[1]
    if ROWS > PIECE:
        left, right = tl.split(product.reshape(TOKENS, 2, ROWS // 2).permute(0, 2, 1))
        record(left, first, first_row, rows, vocab, tile, head, sampling, parts, tiles, GREEDY, TEMPERED)
        record(right, first, first_row + ROWS // 2, rows, vocab, tile, head, sampling, parts, tiles, GREEDY, TEMPERED)
    elif first_row < rows:
        logit_scale, softcap = head
        temperature, inverse_temperature, seed_low, seed_high, sequence, position = sampling
        row = first_row + tl.arange(0, ROWS)
        inside = row < rows
        its_sequence = tl.load(sequence + row, mask=inside, other=0).to(tl.uint32)
        its_position = tl.load(position + row, mask=inside, other=0).to(tl.uint32)
        token = tile_token(first, TOKENS)
        logit = head_logit(product, None, token[:, None], (token < vocab)[:, None], logit_scale, softcap)
        words = None if GREEDY else words_of_tile(seed_low, seed_high, its_sequence, its_position, first, TOKENS)
        values = draw_from_tile(logit, token, words, temperature, inverse_temperature, GREEDY, TEMPERED)
        store_part(parts, row.to(tl.int64) * tiles + tile, inside, values)


@triton.jit(do_not_specialize=["rows", "seed_low", "seed_high"])
def head_draw_kernel(
    hidden,  # [rows, dim]
    hidden_stride,  # of its rows
    weight,  # [vocab, dim]
    weight_stride,
    rows,
    vocab,
    dim,
    bias,
    logit_scale,
    softcap,
    temperature,
    inverse_temperature,
    seed_low,
    seed_high,
    sequence,  # int64 [rows]
    position,
    tops,  # this and what follows: [rows, tiles]
    masses,
    tempered_masses,
    winners,
    tokens,
    tiles,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    PRECISION: tl.constexpr,
    VOCAB_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    WHOLE: tl.constexpr,  # DIM_TILE divides dim
):
    row_tiles = tl.cdiv(rows, ROW_TILE)
    tile = tl.program_id(0) // row_tiles
    first = tile * VOCAB_TILE
    first_row = tl.program_id(0) % row_tiles * ROW_TILE
    row = first_row + tl.arange(0, ROW_TILE)
    token = tile_token(first, VOCAB_TILE)
    column = tl.arange(0, DIM_TILE)
    real = (row < rows)[:, None]
    hidden += row.to(tl.int64)[:, None] * hidden_stride + column[None, :]
    # tokens beyond the last are copies of it
    weight += tl.minimum(token, vocab - 1).to(tl.int64)[:, None] * weight_stride + column[None, :]
    product = tl.zeros([VOCAB_TILE, ROW_TILE], tl.float32)
    for begin in range(0, dim, DIM_TILE):
        if WHOLE:
            a = tl.load(weight)
            b = tl.load(hidden, mask=real, other=0)
        else:
            a = tl.load(weight, mask=(begin + column < dim)[None, :], other=0)
            b = tl.load(hidden, mask=real & (begin + column < dim)[None, :], other=0)
        product = dot(a, tl.trans(b), product, PRECISION)
        weight += DIM_TILE
        hidden += DIM_TILE

    if bias is not None:  # here rather than with each piece: its loads would be held in registers
        product += tl.load(bias + token, mask=token < vocab, other=0).to(tl.float32)[:, None]
    head = (logit_scale, softcap)
    sampling = (temperature, inverse_temperature, seed_low, seed_high, sequence, position)
    parts = (tops, masses, tempered_masses, winners, tokens)
    record(product, first, first_row, rows, vocab, tile, head, sampling, parts, tiles, GREEDY, TEMPERED)


def variants(capability: int) -> list[Variant]:
    """The fused kernel at the heads of the models that `pmc_fast` is measured on."""
    dtypes = {"Llama-3.2-3B": ("bf16", "fp16", "fp32")}
    listed = [
        _variant(f"{model.name}, {dtype}", model, dtype, greedy=False)
        for model in MODELS
        for dtype in dtypes.get(model.name, ("bf16",))
    ]
    (llama,) = (model for model in MODELS if model.name == "Llama-3.2-3B")
    listed.append(_variant("greedy, Llama-3.2-3B, bf16", llama, "bf16", greedy=True))
    return listed


def _variant(name: str, model: Model, dtype: str, greedy: bool) -> Variant:
    tiles = tiles_for(FUSED_ROWS, model.size, 4 if dtype == "fp32" else 2)
    head = model.optional("*" + dtype) | {"logit_scale": None}
    signature = {"hidden": "*" + dtype, "hidden_stride": "i32", "weight": "*" + dtype, "weight_stride": "i32"}
    signature |= dict.fromkeys(("rows", "vocab", "dim"), "i32")
    signature |= {"temperature": "fp32", "inverse_temperature": "fp32"}
    return Variant(
        name=name,
        kernel=head_draw_kernel,
        signature=signature | present(head) | NOISE_OF_A_GRAPH | PARTS,
        constants=absent(head)
        | {"GREEDY": greedy, "TEMPERED": not greedy, "PRECISION": "ieee", "WHOLE": model.size % tiles.dim == 0}
        | {"VOCAB_TILE": tiles.vocab, "ROW_TILE": tiles.rows, "DIM_TILE": tiles.dim},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        matmul=True,
        aligned=("hidden", "hidden_stride", "weight", "weight_stride", "dim", "vocab")
        + (("bias",) if model.bias else ()),
    )
