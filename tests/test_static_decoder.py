"""Decoding from fixed memory gives the answers of the model's modules; on a GPU its steps are CUDA graphs.

Without one most tests have torch in the kernels' place, which are tested in tests/kernels: the interpreter is slow. How
models of other kinds get there is in test_static_modules.py.
"""

import gc
import math
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from draws import assert_same, differ
from tiny import KNOWN, VOCAB, make_model, make_tokenizer
from transformers.activations import NewGELUActivation

pytest.importorskip("triton")
from static_decoding import DEVICE, PROMPTS, adapt, by_modules, sample, watch

from pmc_fast import attention, gpu, graph_rows, static_decoder, static_layers
from pmc_fast.prompts import Prompts
from pmc_fast.pruning import Pruner
from pmc_fast.rewards import RougeRecall
from pmc_fast.sampler import Sampler
from pmc_fast.static_rows import STEPS_AHEAD, Counts

BOTH = {"llama": "cuda graph", "cohere": "cuda graph of modules"}  # one of a known kind, one of any other
KERNELS = gpu.kernels


def make(family, seed):
    model = make_model(family, seed=seed, **KNOWN.get(family, {})).to(DEVICE)
    if family == "gemma2":  # transformers gives it eager attention, training this library's
        attention.install(model)
    return model


@pytest.fixture
def built(monkeypatch):
    return watch(monkeypatch)


@pytest.fixture
def the_kernels(monkeypatch):
    """Run by themselves; a copy of rows is shared out among few programs, each of which the interpreter takes in turn."""
    monkeypatch.setattr(gpu, "kernels", KERNELS)
    if DEVICE == "cpu":
        monkeypatch.setattr(KERNELS("copy_rows"), "PROGRAMS", 40)


@pytest.fixture
def steps(monkeypatch):
    """The rows, the texts and the answers that run of each step; before it, all that no text has written becomes NaN."""
    seen, advance = [], static_decoder.StaticDecoder._advance

    def watched(decoder, rows):
        texts, running = decoder._rows._counts[:2].tolist()
        seen.append((rows, texts, running))
        decoder.layers.own[:, :, max(1, texts) :] = torch.nan
        decoder.layers.own[..., int(decoder._rows.step[0]) - 1 :, :] = torch.nan
        advance(decoder, rows)

    monkeypatch.setattr(static_decoder.StaticDecoder, "_advance", watched)
    return seen


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3, 4, 5, 6, 7, 8]]], ids=["padded", "one prompt"])
@pytest.mark.parametrize("family", KNOWN)
def test_same_answers_as_the_modules(family, prompts, built, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    got = sample(model, rng_seed, prompts=prompts)
    assert len(built) == 1 and built[0] is not None
    assert_same(got, by_modules(model, rng_seed, monkeypatch, prompts=prompts))


def test_the_draw_is_chosen_by_its_options(built, monkeypatch):
    asked = []
    monkeypatch.setattr(static_decoder, "preferred", lambda *options: options)
    monkeypatch.setattr(static_decoder.backend, "choose", lambda *args: asked.append(args) or "triton")
    sample(make_model("llama").to(DEVICE), 0, top_k=7)
    assert asked[-1] == ("linear_sample", None, DEVICE, torch.float32, (DEVICE, 0.9, 7, 0.95, 0.0))


def test_a_draw_that_no_graph_can_hold_is_left_to_the_modules(built, monkeypatch):
    monkeypatch.setattr(static_decoder.backend, "choose", lambda op, impl, *args: impl or "triton")
    sample(make_model("llama").to(DEVICE), 0, impl="reference", max_new_tokens=2)
    assert built == [None]


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}, {"min_p": -0.1}, {"impl": "none"}], ids=str
)
def test_options_out_of_range_are_refused_before_anything_runs(options, built):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}, expected"):
        sample(make_model("llama").to(DEVICE), 0, **options)
    assert not built


def test_kernels_get_numbers_of_the_types_that_they_are_compiled_for(built, rng_seed):
    model, options = make_model("llama", seed=rng_seed).to(DEVICE), {"top_p": np.float32(0.5), "min_p": 0}
    got = sample(model, np.int64(rng_seed), temperature=1, top_k=np.int64(9), **options)
    options = {"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.0}
    assert_same(got, sample(model, rng_seed, **options))
    given, usual = (decoder._draw_options for decoder in built)
    assert all(given[name] == usual[name] and type(given[name]) is type(usual[name]) for name in options)
    assert {type(given[name]) for name in options} == {float, int}


@pytest.mark.parametrize("impl", ["cuda"])
def test_draws_by_cuda(impl, steps, monkeypatch, rng_seed):
    """From rows for texts, of which those beyond the texts are NaN."""
    built = watch(monkeypatch, drawing=impl)
    model, options = make("llama", rng_seed), {"num_samples": 6, "top_k": 3, "eos_token_id": 257}
    got = sample(model, rng_seed, **options)
    assert built[0] is not None and any(rows < 24 for rows, *_ in steps)
    assert_same(got, by_modules(model, rng_seed, monkeypatch, **options))


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_lora_adapters(family, built, monkeypatch, rng_seed):
    model = adapt(make_model(family, seed=rng_seed).to(DEVICE))
    model.add_adapter("other", model.peft_config["default"])
    adapted = sample(model, rng_seed)
    assert built[-1] is not None
    assert_same(adapted, by_modules(model, rng_seed, monkeypatch))
    for change in (model.merge_adapter, model.unmerge_adapter, lambda: model.set_adapter("other")):
        change()
        assert_same(sample(model, rng_seed), by_modules(model, rng_seed, monkeypatch))
        assert built[-1] is not None
    with model.disable_adapter():
        plain = sample(model, rng_seed)
        assert_same(plain, by_modules(model, rng_seed, monkeypatch))
        assert built[-1] is not None
    assert differ(plain, adapted)


@pytest.mark.parametrize("family", ["qwen3", "phi", "gemma3_text", "gpt_neox", "opt"])
def test_the_kernels_themselves(family, built, the_kernels, steps, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    options = {"prompts": PROMPTS[:2], "num_samples": 3, "max_new_tokens": 4, "top_k": 2, "eos_token_id": 257}
    got = sample(model, rng_seed, **options)
    assert built[0] is not None
    assert_same(got, by_modules(model, rng_seed, monkeypatch, **options))


@pytest.mark.parametrize("family, size", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_an_answer_that_ended_takes_no_position_that_was_not_learned(family, size, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed, **KNOWN[family], **{size: 16}).to(DEVICE)
    # Those that end have more rows than the last prompt's answers can take, if answers part.
    options = {"prompts": [list(range(14)), list(range(20, 34)), [4]], "max_new_tokens": torch.tensor([2, 2, 15])}
    options |= {"eos_token_id": 257, "temperature": 3.0}
    got = sample(model, rng_seed, **options)
    assert built[0] is not None and built[0]._rows.position.max() > 16
    assert_same(got, by_modules(model, rng_seed, monkeypatch, **options))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere"])
def test_prompts_that_are_read_at_once(family, built, the_kernels, steps, monkeypatch, rng_seed):
    """For all their rows, by the kernels themselves; what stands before a prompt may be anything."""
    kernels, asked = KERNELS("prefix_attention"), []
    monkeypatch.setattr(kernels, "LEAST_SAVED_BYTES", -math.inf)
    find = kernels.sharers_of
    monkeypatch.setattr(kernels, "sharers_of", lambda *args: asked.append(find(*args)) or asked[-1])
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda x, *size, **options: (made := new_empty(x, *size, **options)).fill_(
            torch.nan if made.is_floating_point() else 3
        ),
    )
    model = make_model(family, seed=rng_seed).to(DEVICE)
    options = {"prompts": PROMPTS[:3], "num_samples": 3, "max_new_tokens": 4, "top_k": 2, "eos_token_id": 257}
    got = sample(Sampler(model, keep_graphs=True), rng_seed, **options)
    assert (
        built[0] is not None and 0 < len(asked) <= len(steps) + 1
    )  # once a step, and in the trial of a model's own modules
    assert_same(got, by_modules(model, rng_seed, monkeypatch, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 1, "prompts": PROMPTS[:1]},
        {"max_new_tokens": 1},
        {"max_new_tokens": torch.tensor([2, 7, 1, 5])},
        {"eos_token_id": 257},  # hardly ever drawn: every answer is cut off
        {"eos_token_id": list(range(VOCAB))},  # every answer ends at once
        {"temperature": 0.0},
        {"top_k": 20, "min_p": 0.01, "sequence_ids": torch.tensor([3, 0, 9, 1])},
    ],
    ids=lambda changes: ", ".join(changes),
)
@pytest.mark.parametrize("family", BOTH)
def test_edges(family, changes, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed).to(DEVICE)
    changes = {k: v.to(DEVICE) if k == "sequence_ids" else v for k, v in changes.items()}
    assert_same(sample(model, rng_seed, **changes), by_modules(model, rng_seed, monkeypatch, **changes))
    assert built[0] is not None


def chain(rows):
    """The numbers of rows that steps may have."""
    found = [rows]
    while found[-1] > 2:
        found.append(-(-found[-1] // 4) * 2)
    return found


@pytest.mark.parametrize("family", [*KNOWN, "cohere"])
def test_answers_that_say_the_same_so_far_share_a_row(family, built, steps, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    # Hot, so that also of models that are sure the answers part.
    options = {"num_samples": 20, "top_k": 2, "temperature": 3.0, "eos_token_id": 257}
    options["max_new_tokens"] = torch.tensor([16, 6, 9, 8])
    got = sample(model, rng_seed, **options)
    rows, texts, running = zip(*steps, strict=True)
    assert_same(got, by_modules(model, rng_seed, monkeypatch, **options))
    assert got.decoded == sum(texts) < got.count - 80
    fewest, most = ([min(x for x in chain(80) if x >= needs) for needs in counts] for counts in (texts, running))
    for step, has in enumerate(rows):
        lately = slice(max(0, step - STEPS_AHEAD), step + 1)
        assert has >= fewest[step] and has in fewest[lately]
        if all(few < more for few, more in zip(fewest[lately], most[lately], strict=True)):
            assert has == fewest[step]
    assert rows[0] < max(rows) > rows[-1]  # they become more and fewer
    assert max(step for step in range(1, len(texts)) if texts[step] > texts[step - 1]) > 2  # texts have lengths to copy


def test_greedy_answers_are_a_row_for_each_prompt(built, steps, monkeypatch, rng_seed):
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    options = {"num_samples": 20, "temperature": 0.0, "eos_token_id": VOCAB, "max_new_tokens": 32}
    want = by_modules(sampler.lm, rng_seed, monkeypatch, **options)
    for _ in range(3):
        assert_same(sample(sampler, rng_seed, **options), want)
        # Rows without a text look up angles, too.
        assert built[0]._rows.position.max() < 32 + 32
    assert steps == [(4, 4, 80)] * 31 * 3


def test_the_host_waits_only_while_that_may_save_rows():
    device = torch.tensor([3, 9], device=DEVICE)
    counts = Counts(device, lambda texts: 4 if texts <= 4 else 10)
    assert counts.latest() == (3, 9)

    def step(texts, running):
        device.copy_(torch.tensor([texts, running]))
        counts.note()
        return counts.latest()

    assert [step(4, 9), step(4, 8), step(5, 8)] == [(4, 9), (4, 8), (5, 8)]
    late = [step(6, 8), step(7, 7), step(6, 6), step(5, 6), step(4, 5)]
    assert late == [(5, 8)] * STEPS_AHEAD + [(6, 8), (7, 7), (6, 6)]
    assert [step(4, 4), step(3, 3)] == [(5, 6), (4, 4)]  # what follows (4, 5) is read at once
    assert [step(2, 2), step(1, 1), step(1, 1)] == [(4, 4), (3, 3), (2, 2)]
    counts.forget()
    assert counts.latest() == (1, 1) and step(0, 0) == (1, 1)


def test_counts_are_read_on_the_host_whatever_the_default_device_is():
    counts = Counts(torch.tensor([2, 2], device=DEVICE), lambda texts: texts)
    assert counts.latest() == (2, 2)
    with torch.device("meta"):
        for _ in range(STEPS_AHEAD + 1):
            counts.note()
        assert counts.latest() == (2, 2)


@pytest.fixture
def captured(monkeypatch):
    """Steps that were run, captured and replayed, as (what, rows), without a GPU."""
    if DEVICE == "cuda":
        pytest.skip("a GPU captures by itself")
    seen, capturing, pools, run = [], [], [None], static_decoder.StaticDecoder._step
    workspaces = ["another's"]

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            seen.append(("replay", self.rows))
            run(self.decoder, self.rows)

    def step(decoder, rows):
        if capturing:
            capturing[0].decoder, capturing[0].rows = decoder, rows
            seen.append(("capture", rows))
        else:
            seen.append(("run", rows))
            run(decoder, rows)

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert static_decoder._capturing.locked()  # other threads have the same stream
        assert workspaces == ["anew"]
        assert pool == pools[-1]  # one for all graphs
        pools.append("pool")
        capturing.append(graph)
        yield
        capturing.clear()
        workspaces[0] = "the graph's"

    init = static_decoder.StaticDecoder.__init__

    def make(decoder, *args):
        init(decoder, *args)
        decoder.captures = True

    monkeypatch.setattr(graph_rows, "SPARED_ROWS", 40)
    monkeypatch.setattr(static_decoder.StaticDecoder, "__init__", make)
    monkeypatch.setattr(static_decoder.StaticDecoder, "_step", step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(static_decoder, "_capture_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: workspaces.__setitem__(0, "anew"), raising=False
    )
    yield seen
    assert workspaces != ["the graph's"]  # which nobody else finds


def test_the_second_step_of_so_many_rows_is_captured(captured, built, monkeypatch, rng_seed):
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    options = {"num_samples": 20, "top_k": 2, "eos_token_id": 257, "max_new_tokens": 16}
    want = by_modules(sampler.lm, rng_seed, monkeypatch, **options)
    assert_same(sample(sampler, rng_seed, **options), want)
    for rows in {rows for _, rows in captured}:
        mine = [what for what, its in captured if its == rows]
        assert mine == ["run", "capture", *["replay"] * (len(mine) - 2)][: len(mine)]
    assert len([what for what, _ in captured if what == "replay"]) > 7
    captured.clear()
    assert_same(sample(sampler, rng_seed + 1, **options), by_modules(sampler.lm, rng_seed + 1, monkeypatch, **options))
    assert ("capture", 80) not in captured and captured.count(("replay", 80)) > 1  # kept from the call before


def test_kept_graphs_do_not_need_those_of_another_sampler(built, monkeypatch, rng_seed):
    """On a GPU, whose library of products keeps memory by stream, which all captures share."""
    gone, stays = (Sampler(make_model(seed=rng_seed + i).to(DEVICE), keep_graphs=True) for i in range(2))
    options = {"num_samples": 6, "max_new_tokens": 6, "eos_token_id": 257}
    for sampler in (gone, stays):
        for seed in (rng_seed, rng_seed + 1):
            sample(sampler, seed, **options)
    want = by_modules(stays.lm, rng_seed + 2, monkeypatch, **options)
    del gone, sampler
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.full((2**26,), torch.nan, device=DEVICE)
    assert_same(sample(stays, rng_seed + 2, **options), want)


def test_what_cannot_be_captured_is_launched_one_by_one(captured, built, monkeypatch, rng_seed):
    def refuse(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph, so it is slow: operation not permitted"):
        got = sample(sampler, rng_seed)
    assert sampler.decoder == "launches"
    assert_same(got, by_modules(sampler.lm, rng_seed, monkeypatch))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(sample(sampler, rng_seed), got)
    assert {what for what, _ in captured} == {"run"} and sampler.decoder == "launches"


@pytest.mark.parametrize("family", BOTH)
def test_waves(family, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed).to(DEVICE)
    budget = Sampler(model).cache_bytes(4, 7 + 7)
    assert_same(sample(model, rng_seed, cache_budget=2 * budget), by_modules(model, rng_seed, monkeypatch))
    assert len(built) == 2 and built[0].sizes.prompts == 2


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(("num_samples", "top_k"), [(4, None), (12, 6)], ids=["little in common", "much"])
def test_pruning_stops_the_same_answers(family, num_samples, top_k, built, steps, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed).to(DEVICE)
    letters = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")

    def pruner():
        held = np.full(len(PROMPTS), 0.04)
        return Pruner(RougeRecall(), Prompts(make_tokenizer()), [letters] * len(PROMPTS), held, num_samples, interval=2)

    options = {"max_new_tokens": 16, "eos_token_id": 257, "num_samples": num_samples, "top_k": top_k}
    got = sample(model, rng_seed, prune=pruner(), **options)
    assert_same(got, by_modules(model, rng_seed, monkeypatch, prune=pruner(), **options))
    assert got.pruned.any() and not got.pruned.all()


@torch.no_grad()
@pytest.mark.parametrize("family", BOTH)
def test_kept_graphs_serve_other_seeds_about_the_same_sizes_and_weights_that_change(
    family, built, monkeypatch, rng_seed
):
    model = make_model(family, seed=rng_seed).to(DEVICE)
    sampler = Sampler(model, keep_graphs=True)
    others = [[9, 8], [7], [6, 5, 4], [3]]
    for seed, prompts, steps in ((rng_seed, PROMPTS, 7), (0, PROMPTS, 5), (2**63 - 1, others, 9)):
        options = {"prompts": prompts, "max_new_tokens": steps}
        assert_same(sample(sampler, seed, **options), by_modules(model, seed, monkeypatch, **options))
        assert sampler.decoder == BOTH[family]
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert built[0] is built[1] is built[2]


@pytest.mark.parametrize("family", BOTH)
def test_kept_graphs_serve_calls_in_inference_mode_and_others(family, built, rng_seed):
    sampler = Sampler(make_model(family, seed=rng_seed).to(DEVICE), keep_graphs=True)
    with torch.inference_mode():
        first = sample(sampler, rng_seed)
    assert_same(sample(sampler, rng_seed), first)
    with torch.inference_mode():
        assert_same(sample(sampler, rng_seed), first)
    assert built[0] is built[1] is built[2] is not None


class StopsTheFirst:
    """A pruner that looks once."""

    interval = 2

    def part(self, begin, end):
        return self

    def __call__(self, running, tokens, lengths):
        return torch.arange(len(running)) == 0 if tokens.shape[1] == 2 else None


def test_nothing_is_left_of_a_call_that_was_broken_off(built, rng_seed):
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    want, running = sample(sampler, rng_seed, eos_token_id=VOCAB), []

    def stop(count):
        running.append(count)
        if len(running) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(sampler, rng_seed, eos_token_id=VOCAB, prune=StopsTheFirst(), progress=stop)
    got = sample(sampler, rng_seed, eos_token_id=VOCAB)
    assert_same(got, want)
    assert built[0] is built[2] and running[-1] == 15 and not got.pruned.any() and got.decoded == want.decoded


@torch.no_grad()
@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(
    "change",
    [
        lambda model, options: options.update(temperature=0.8),
        lambda model, options: options.update(eos_token_id=[5, 6]),
        lambda model, options: options.update(num_samples=5),
        lambda model, options: options.update(max_new_tokens=40),
        lambda model, options: setattr(model.model.norm, "weight", torch.nn.Parameter(2 * model.model.norm.weight)),
        lambda model, options: setattr(
            model.model.embed_tokens, "weight", torch.nn.Parameter(2 * model.model.embed_tokens.weight)
        ),
        lambda model, options: setattr(model.lm_head, "weight", torch.nn.Parameter(2 * model.lm_head.weight)),
        lambda model, options: setattr(model.lm_head, "bias", torch.nn.Parameter(torch.randn(VOCAB, device=DEVICE))),
    ],
)
def test_kept_graphs_serve_no_other_call(family, change, built, monkeypatch, rng_seed):
    model, options = make_model(family, seed=rng_seed).to(DEVICE), {"seed": rng_seed}
    sampler = Sampler(model, keep_graphs=True)
    sample(sampler, **options)
    change(model, options)
    assert_same(sample(sampler, **options), by_modules(model, monkeypatch=monkeypatch, **options))
    assert built[0] is not built[1]
    sample(sampler, rng_seed)
    assert built[2] is not built[0]  # gone with the call that had no use for it


@pytest.mark.parametrize("family", BOTH)
def test_kept_graphs_know_which_adapters_are_on(family, built, monkeypatch, rng_seed):
    model = adapt(make_model(family, seed=rng_seed).to(DEVICE))
    model.add_adapter("other", model.peft_config["default"])
    sampler = Sampler(model, keep_graphs=True)
    sample(sampler, rng_seed)

    def scale():
        for module in model.modules():
            getattr(module, "scale_layer", float)(2.0)

    for change in (model.merge_adapter, model.unmerge_adapter, lambda: model.set_adapter("other"), scale):
        change()
        assert_same(sample(sampler, rng_seed), by_modules(model, rng_seed, monkeypatch))
        assert built[-1] is not None and built[-1] is not built[-2]


@pytest.mark.parametrize("family", BOTH)
def test_nothing_is_kept_unless_asked_for(family, built, rng_seed):
    sampler = Sampler(make_model(family, seed=rng_seed).to(DEVICE))
    sample(sampler, rng_seed), sample(sampler, rng_seed)
    assert built[0] is not built[1]
    memory = [weakref.ref(decoder) for decoder in built]
    built.clear()
    gc.collect()
    assert not any(decoder() for decoder in memory)


class Thing:
    """That a weak reference can be had of."""


def test_what_a_call_had_no_use_for_is_gone():
    kept = static_decoder.KeptDecoders()
    with kept.call():
        used, other = (weakref.ref(kept.get(key, Thing)) for key in ("used", "other"))
    with kept.call():
        kept.get("used", Thing)
    assert used() is not None and other() is None


def test_kept_memory_fits_the_budget(built, monkeypatch, rng_seed):
    monkeypatch.setattr(static_layers, "COPY_SHARE", 0.0)  # keys and values alone
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    want = by_modules(sampler, rng_seed, monkeypatch)
    one = sampler.cache_bytes(4, 32 + 32) + sampler.cache_bytes(1, 7)
    with pytest.raises(ValueError, match=f"cache_budget: got {one - 1} bytes, expected at least {one}"):
        sample(sampler, rng_seed, cache_budget=one - 1)
    assert_same(sample(sampler, rng_seed, cache_budget=2 * one), want)  # of waves in the same memory
    assert [decoder.sizes.prompts for decoder in built] == [2, 2] and built[0] is built[1]
    assert built[0].layers.held_bytes <= 2 * one
    built.clear()
    sample(sampler, rng_seed, cache_budget=3 * one)  # waves of 3 and 1 would hold memory for 4
    assert [decoder.sizes.prompts for decoder in built] == [2, 2] and sampler._kept.held_bytes <= 3 * one


def test_what_a_call_keeps_is_free_for_the_next(built, monkeypatch, rng_seed):
    """Copies of weights, too, of which two decoders have the same."""
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    total = 2 * 4 * (sampler.cache_bytes(4, 32 + 32) + sampler.cache_bytes(1, 7))

    def free(device):
        layers = [decoder.layers for decoder in set(built)]
        copies = {copy.data_ptr(): copy for held in layers for joint in held.joints for copy, _ in joint._copies}
        own = [x for held in layers for x in (held.own, held._kept_prefix)]
        return total - sum(x.nbytes for x in (*own, *copies.values()))

    monkeypatch.setattr("pmc_fast.sampler.free_bytes", free)
    for _ in range(3):
        sample(sampler, rng_seed)
    assert len(built) == 3 and built[0] is built[1] is built[2] and built[0].layers.joints
    one = built[0]
    sample(sampler, rng_seed, num_samples=5, prompts=PROMPTS[:1])
    assert built[-1] is not one and {*built[-1].layers.joints} == {*one.layers.joints}


def test_what_is_kept_for_other_calls_is_freed_before_memory_is_made(built, monkeypatch, rng_seed):
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    sample(sampler, rng_seed)
    earlier, seen, make = weakref.ref(built.pop()), [], static_decoder.StaticLayers

    def watched(*args):
        gc.collect()
        seen.append(earlier())
        return make(*args)

    monkeypatch.setattr(static_decoder, "StaticLayers", watched)
    sample(sampler, rng_seed)
    assert not seen
    built.clear()
    sample(sampler, rng_seed, num_samples=5)
    assert seen == [None] and sampler._kept.held_bytes > 0


def more_bias(model):
    linear = model.model.layers[0].mlp.fc2
    linear.bias = torch.nn.Parameter(1 + linear.bias)


def other_positions(model):
    table = model.transformer.wpe
    table.weight = torch.nn.Parameter(table.weight.flip(0))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", lambda model: setattr(model.model.norm, "variance_epsilon", 0.1)),
        ("llama", lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1)),
        ("llama", lambda model: setattr(model.model.layers[1].mlp, "act_fn", NewGELUActivation())),
        (
            "llama",
            lambda model: model.model.rotary_emb.register_buffer("inv_freq", 0.5 * model.model.rotary_emb.inv_freq),
        ),
        ("granite", lambda model: setattr(model.model, "embedding_multiplier", 3.0)),
        ("phi", more_bias),
        ("gpt2", other_positions),
        ("olmo", lambda model: setattr(model.config, "clip_qkv", 0.1)),
        ("smollm3", lambda model: setattr(model.model.layers[0].self_attn, "use_rope", 0)),
    ],
    ids=["epsilon", "scale", "activation", "angles", "embedding", "bias", "positions", "clip", "no angles"],
)
def test_kept_graphs_know_what_is_in_them(family, change, built, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    sampler = Sampler(model, keep_graphs=True)
    sample(sampler, rng_seed)
    change(model)
    assert_same(sample(sampler, rng_seed), by_modules(model, rng_seed, monkeypatch))
    assert built[0] is not built[1]


def test_kept_graphs_know_how_exact_their_products_are(built, rng_seed):
    sampler = Sampler(make_model(seed=rng_seed).to(DEVICE), keep_graphs=True)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            sample(sampler, rng_seed)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len({id(decoder) for decoder in built}) == 2 and built[0] is built[1]


@pytest.mark.parametrize("family", BOTH)
def test_the_sampler_says_what_decoded(family, built, monkeypatch, rng_seed):
    sampler = Sampler(make_model(family, seed=rng_seed).to(DEVICE))
    sample(sampler, rng_seed)
    assert sampler.decoder == BOTH[family]
    by_modules(sampler, rng_seed, monkeypatch)
    assert sampler.decoder in ("native", "modules")


def test_progress_ends_with_few_rows(built, rng_seed):
    seen = []
    sample(make_model(seed=rng_seed).to(DEVICE), rng_seed, progress=seen.append)
    assert seen and seen[0] <= 16 and seen == sorted(seen, reverse=True)


def test_no_step_is_taken_for_answers_that_have_ended(built, steps):
    sample(make_model().to(DEVICE), 0, eos_token_id=list(range(VOCAB)))
    assert built[0] is not None and not steps


def test_attention_that_is_not_torchs_is_left_to_the_modules(built, rng_seed):
    model = make_model("gemma2", seed=rng_seed).to(DEVICE)
    model.set_attn_implementation("eager")
    sample(model, rng_seed, max_new_tokens=2)
    assert built == [None]


def test_a_product_that_somebody_replaced_is_left_to_the_modules(built, monkeypatch, rng_seed):
    model = make_model(seed=rng_seed).to(DEVICE)
    before = sample(model, rng_seed)
    linear = model.model.layers[0].self_attn.o_proj
    linear.forward = lambda x, forward=linear.forward: 1.5 * forward(x)
    got = sample(model, rng_seed)
    assert built[0] is not None and built[1] is None
    assert differ(before, got)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi", "granite", "gemma3_text", "olmo2", "cohere"])
def test_in_bfloat16_it_is_near_the_exact_model(family, built, rng_seed):
    model = make_model(family, seed=rng_seed).bfloat16().to(DEVICE)
    exact = make_model(family, seed=rng_seed).bfloat16().float().to(DEVICE)
    samples, errors = sample(model, rng_seed), []
    assert built[-1] is not None
    for prompt, tokens, lengths, logprobs in zip(
        PROMPTS, samples.tokens, samples.lengths, samples.logprobs, strict=True
    ):
        for answer, length, logprob in zip(tokens, lengths.tolist(), logprobs, strict=True):
            ids = torch.cat([torch.tensor(prompt, device=DEVICE), answer[:length]])[None]
            want = exact(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            errors.append(logprob[:length] - want.gather(1, answer[:length, None])[:, 0])
    assert torch.cat(errors).square().mean().sqrt() < 0.02  # of 80 seeds each, 0.007 at most
