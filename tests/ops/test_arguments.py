"""Arguments of another type than the ops want or on another device are named, with what was got and what is wanted."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pmc_fast import (
    collapse_loss,
    decode_attention,
    linear_logprob,
    linear_sample,
    packed_attention,
    parallel_head,
    sample,
)
from pmc_fast.parallel_head import VocabShards

HIDDEN, WEIGHT, BIAS = torch.randn(5, 8), torch.randn(13, 8), torch.randn(13)
TARGET, ROW = torch.randint(0, 13, (5,)), torch.zeros(5, dtype=torch.int64)
HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "softcap": 3.0, "logit_scale": 0.7}
DRAW = {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 3, "sequence": ROW, "position": ROW}
CACHE = torch.randn(5, 2, 3, 8)
ARGUMENTS = {
    collapse_loss: {**HEAD, "target": TARGET, "token_weight": torch.rand(5), "ignore_index": -100},
    linear_logprob: {**HEAD, "target": TARGET, "temperature": 0.7, "ignore_index": -100},
    sample: {"logits": torch.randn(5, 13), **DRAW},
    linear_sample: {**HEAD, **DRAW, "hidden_row": ROW},
    decode_attention: {
        "query": torch.randn(5, 4, 8),
        "key": CACHE,
        "value": CACHE,
        "first": ROW,
        "scale": 0.3,
        "softcap": 4.0,
        "prefix_key": CACHE,
        "prefix_value": CACHE,
        "prefix_row": ROW,
        "length": ROW + 2,
    },
    packed_attention: {
        "query": torch.randn(5, 4, 8),
        "key": torch.randn(5, 2, 8),
        "value": torch.randn(5, 2, 8),
        "lengths": [2, 3],
        "scale": 0.3,
        "softcap": 4.0,
        "window": 2,
    },
}
SHARED = {getattr(parallel_head, op.__name__): ARGUMENTS[op] for op in (collapse_loss, linear_logprob, linear_sample)}
OPTIONAL = (
    "bias",
    "softcap",
    "ignore_index",
    "top_k",
    "sequence",
    "position",
    "hidden_row",
    "scale",
    "length",
    "window",
)


def refuses_other_types(op, arguments):
    op(**arguments)
    for name, good in arguments.items():
        bad = ["3", True, [1, 2]]
        if isinstance(good, torch.Tensor):
            bad += [good.numpy(), 1.0, good.int(), good[..., None]]
            if name != next(iter(arguments)):  # whose device the others must be on
                bad.append(good.to("meta"))
        else:
            bad.append(np.ones(1))
        if name not in OPTIONAL and not name.startswith("prefix"):
            bad.append(None)
        for value in bad:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*, expected "):
                op(**{**arguments, name: value})


@pytest.mark.parametrize("op", ARGUMENTS, ids=lambda op: op.__name__)
def test_other_types(op):
    refuses_other_types(op, ARGUMENTS[op])
    for impl in (3, True, ["native"], "fast"):
        with pytest.raises(ValueError, match="^impl: got .*, expected None or one of 'cuda', "):
            op(**ARGUMENTS[op], impl=impl)


@pytest.mark.parametrize("op", SHARED, ids=lambda op: op.__name__)
def test_other_types_with_a_shared_head(op):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shards = VocabShards.of(WEIGHT)
        refuses_other_types(lambda **arguments: op(**arguments, shards=shards), SHARED[op])
    finally:
        dist.destroy_process_group()


def test_what_the_errors_say():
    for call, message in [
        (lambda: linear_logprob(HIDDEN, WEIGHT, [1, 2]), "target: got a value of type list, expected a tensor"),
        (lambda: sample(HIDDEN, top_p=None), r"top_p: got None, expected a number in \(0, 1\]"),
        (lambda: sample(HIDDEN, temperature="1"), "temperature: got '1', expected a number"),
    ]:
        with pytest.raises(TypeError, match=f"^{message}$"):
            call()


def shared_draw(hidden, **options):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return parallel_head.linear_sample(hidden, WEIGHT, shards=VocabShards.of(WEIGHT), **options)
    finally:
        dist.destroy_process_group()


def test_numbers_of_numpy(rng_seed):
    options = {"temperature": 0.5, "logit_scale": 2, "softcap": 4.0}
    numpys = {"temperature": np.float32(0.5), "logit_scale": np.int64(2), "softcap": np.float64(4)}
    got, want = (linear_logprob(HIDDEN, WEIGHT, TARGET, **each) for each in (numpys, options))
    assert torch.equal(got, want)
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "seed": 7}
    numpys = {"top_k": np.int64(3), "top_p": np.float32(0.5), "min_p": np.float16(0.25), "seed": np.uint8(7)}
    for draw in (sample, shared_draw):
        got, want = (draw(HIDDEN, **{**options, **each}) for each in (numpys, options))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", ARGUMENTS, ids=lambda op: op.__name__)
def test_tensors_of_another_layout_are_named(op):
    for name, value in ARGUMENTS[op].items():
        if not isinstance(value, torch.Tensor):
            continue
        for other, got in ((value.to_sparse(), "layout torch.sparse_coo"), (nested(value), "a nested tensor")):
            with pytest.raises(TypeError, match=f"^{name}: got {got}, expected a dense tensor"):
                op(**{**ARGUMENTS[op], name: other})


def nested(value):
    return torch.nested.nested_tensor([*value.unbind()])
