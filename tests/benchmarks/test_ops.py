"""`python -m benchmarks ops` times only what is right, and its judges know right from wrong."""

import json
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import bench_rouge_l_recall, ops
from benchmarks.__main__ import main
from benchmarks.bench import Bench, CannotRun, Verdict
from benchmarks.bench_collapse_loss import CollapseLossBench
from benchmarks.bench_decode_attention import DecodeAttentionBench
from benchmarks.bench_decode_attention_by_prefix import DecodeAttentionByPrefixBench
from benchmarks.bench_decode_attention_by_tiles import DecodeAttentionByTilesBench
from benchmarks.bench_linear_logprob import LinearLogprobBench
from benchmarks.bench_linear_sample import LinearSampleBench
from benchmarks.bench_packed_attention import PackedAttentionBench
from benchmarks.bench_sample import SampleBench, Settings
from benchmarks.bench_sample_by_options import ADVANTAGE, SampleByOptionsBench
from benchmarks.compiled import COMPILED
from benchmarks.limits import measure_limits
from benchmarks.measure import Spread, captured
from benchmarks.oracle import head_gradients, surprise_of_counts, truncated
from benchmarks.shapes import AttentionHeads, Head
from pmc_fast import BackendUnavailable

CPU = torch.device("cpu")
SMALL = Head("small", 1511, 24)


class Doubling(Bench):
    """Contestants double a number; some try."""

    op = "double"
    title = "one number"

    def make_inputs(self, seed, device):
        return seed

    def contestants(self):
        def refuse(x):
            raise NotImplementedError("not today")

        return {"pmc_fast": lambda x: x + x, "peer": lambda x: 2 * x, "squares": lambda x: x * x, "refuses": refuse}

    def oracle(self, inputs):
        return 2 * inputs

    def judge(self, run, result, inputs, oracle, budget):
        return Verdict(result == oracle, f"{result} for {oracle}")


@pytest.fixture
def each_once(monkeypatch):
    """Contestants are not called again and again for a time that is long enough."""
    monkeypatch.setattr(ops, "interleave", partial(ops.interleave, at_least_s=0.0))


def measure(bench, seed, repeats, limit_s, limits=None):
    return ops.measure(bench, bench.contestants(), CPU, seed, repeats, limit_s, limits, lambda: None)


def test_who_is_wrong_or_refuses_gets_no_time(each_once):
    rows = {row.contestant: row for row in measure(Doubling(), 3, 2, 60.0)}
    assert rows["pmc_fast"].ratio == 1 and rows["peer"].ratio > 0
    assert rows["peer"].repeats == 2 and rows["peer"].seconds.median > 0
    assert rows["squares"].right is False and rows["squares"].seconds is None
    assert "not today" in rows["refuses"].evidence and rows["refuses"].seconds is None
    printed = ops.table(list(rows.values()))
    assert "WRONG, not timed: 9 for 6" in printed and "not run: not today" in printed
    assert rows["refuses"].right is None


def test_with_graphs_their_replays_are_timed(each_once, monkeypatch):
    seen, replayed = [], []

    def captured(run):
        seen.append(run())
        if len(seen) == 1:
            return lambda: replayed.append(1)
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr(ops, "captured", captured)
    bench = Doubling()
    rows = ops.measure(bench, bench.contestants(), CPU, 3, 2, 60.0, None, lambda: None, graphs=True)
    rows = {row.contestant: row for row in rows}
    assert seen == [6, 6] and replayed and rows["pmc_fast"].seconds is not None
    assert rows["peer"].seconds is None and "no CUDA graph can hold it: it waits for the GPU" in rows["peer"].evidence


def test_graphs_without_a_gpu_are_refused(capsys):
    assert main(["ops", "--op", "sample", "--graphs"]) == 2
    assert "--graphs: got --device cpu, want a GPU" in capsys.readouterr().err


def test_what_waits_for_the_gpu_is_not_captured(monkeypatch):
    modes, graphs = ["default"], []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graphs.append(graph) or nullcontext())
    seen = []

    def waits():
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(waits)
    assert modes[-1] == "default" and not graphs
    assert captured(lambda: seen.append(modes[-1])) == "replay" and len(graphs) == 1
    assert seen == ["default", "error", "default"]

    @contextmanager
    def restored(stream):
        try:
            yield
        finally:
            seen.append("restored")

    @contextmanager
    def failing(graph):
        yield
        raise RuntimeError("capture failed")  # and torch leaves its own stream the current one

    monkeypatch.setattr(torch.cuda, "stream", restored)
    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.raises(RuntimeError, match="capture failed"):
        captured(lambda: None)
    assert seen[3:] == ["restored"] * 2


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    used = []
    monkeypatch.setattr("pmc_fast.loading.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(ops, "run", lambda args, device: used.append(device.type))
    for device in ("cuda:1", "cuda", "cpu"):
        assert main(["ops", "--device", device]) == 0
    assert used == [torch.device("cuda:1"), "cuda", "cuda", "cpu"]


def test_slow_contestants_run_once(each_once):
    rows = measure(Doubling(), 3, 5, 0.0)
    assert [row.repeats for row in rows if row.right] == [1, 1]


def test_a_compiled_contestant_is_judged_by_its_second_run(each_once):
    calls = []

    class Compiling(Doubling):
        def contestants(self):
            def compiles_first(x):
                calls.append(time.sleep(0 if calls else 0.8))
                return 2 * x

            return {**super().contestants(), COMPILED: compiles_first}

    rows = {row.contestant: row for row in measure(Compiling(), 3, 2, 0.7)}
    assert rows[COMPILED].repeats == 2 and len(calls) > 3
    rows = {row.contestant: row for row in measure(Compiling(), 3, 2, 0.0)}
    assert rows[COMPILED].repeats == 1


def test_on_a_gpu_every_first_run_may_compile(each_once, monkeypatch):
    measuring = ops.Stopwatch, ops.PeakMemory, ops.interleave
    monkeypatch.setattr(ops, "Stopwatch", lambda device: measuring[0](CPU))
    monkeypatch.setattr(ops, "PeakMemory", lambda device: measuring[1](CPU))
    monkeypatch.setattr(ops, "interleave", lambda *args, device, **more: measuring[2](*args, device=CPU, **more))
    compiled = []

    def compiles_first(x):
        compiled.append(time.sleep(0 if compiled else 0.8))
        return 2 * x

    runs = {"pmc_fast": compiles_first}
    (row,) = ops.measure(Doubling(), runs, torch.device("cuda"), 3, 2, 0.7, None, lambda: None)
    assert row.repeats == 2 and row.seconds.median < 0.7


BENCHES = [
    SampleBench(7, SMALL, Settings()),
    SampleBench(7, SMALL, Settings(top_k=50)),
    SampleByOptionsBench(9, SMALL, Settings(), sure=True),
    SampleByOptionsBench(7, SMALL, Settings(min_p=0.05)),
    SampleByOptionsBench(7, SMALL, Settings(top_p=1.0, min_p=0.05)),
    SampleByOptionsBench(7, SMALL, Settings(top_p=1.0)),
    SampleByOptionsBench(7, SMALL, Settings(temperature=0.0, top_p=1.0)),
    LinearSampleBench(7, SMALL, Settings(temperature=1.25, top_k=50)),
    LinearSampleBench(7, SMALL, Settings(top_k=50), torch.bfloat16),
    LinearLogprobBench(37, Head("with bias", 1511, 24, bias=True)),
    LinearLogprobBench(37, Head("with bias", 1511, 24, bias=True), torch.bfloat16, frozen=True),
    CollapseLossBench(37, SMALL),
    CollapseLossBench(37, SMALL, torch.bfloat16),
    DecodeAttentionBench(5, AttentionHeads(6, 2, 40), 23),
    DecodeAttentionBench(5, AttentionHeads(6, 2, 40), 23, torch.bfloat16),
    DecodeAttentionBench(43, AttentionHeads(6, 2, 40), 23, prefix=9),
    DecodeAttentionByPrefixBench(43, AttentionHeads(6, 2, 40), 23, torch.bfloat16, prefix=9),
    DecodeAttentionByTilesBench(5, AttentionHeads(6, 2, 40), 23, torch.bfloat16, prefix=9),
    PackedAttentionBench((5, 9, 3, 20), AttentionHeads(6, 2, 40)),
    PackedAttentionBench((0, 9, 9), AttentionHeads(6, 2, 40), torch.bfloat16),
    bench_rouge_l_recall.RougeLRecallBench(9),
]


INDUCTOR = ("sample", "collapse_loss")  # ops whose first bench has torch's compiler write C++, which takes it seconds


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: f"{bench.op} {bench.title} {bench.dtype}")
def test_every_contestant_is_judged_right(bench, monkeypatch, rng_seed):
    if bench.op not in INDUCTOR or bench is not next(first for first in BENCHES if first.op == bench.op):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what is traced, as it is
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # thousands of draws would take hours in the interpreter
    torch.manual_seed(rng_seed)
    inputs = bench.make_inputs(rng_seed, CPU)
    oracle = bench.oracle(inputs)
    runs = bench.contestants()
    assert len(runs) > 1
    budget = None
    for name in sorted(runs, key=lambda name: name != bench.yardstick):
        try:
            result = runs[name](inputs)
        except (CannotRun, BackendUnavailable, ImportError) as reason:  # rapidfuzz need not be installed
            assert any(words in str(reason) for words in ("GPU", "CUDA kernels", "not bfloat16", "'rapidfuzz'"))
            continue
        verdict = bench.judge(runs[name], result, inputs, oracle, budget)
        assert verdict.right, (name, verdict)
        budget = verdict.errors if name == bench.yardstick else budget


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.95), (0.9, 0.9), (0.9, 1.0)])
def test_draws_from_another_distribution_are_judged_wrong(temperature, top_p, rng_seed):
    torch.manual_seed(rng_seed)
    bench, other = SampleBench(7, SMALL, Settings()), SampleBench(7, SMALL, Settings(temperature, None, top_p))
    inputs = bench.make_inputs(rng_seed, CPU)
    run = other.contestants()["transformers"]
    assert not bench.judge(run, run(inputs), inputs, bench.oracle(inputs), None).right


@pytest.mark.parametrize("part, frozen", [("value", False), ("hidden", False), ("weight", False), ("hidden", True)])
def test_gradients_off_by_a_thousandth_are_judged_wrong(part, frozen, rng_seed):
    bench = CollapseLossBench(37, SMALL, frozen=frozen)
    inputs = bench.make_inputs(rng_seed, CPU)
    run = bench.contestants()[bench.yardstick]
    oracle = bench.oracle(inputs)
    good = run(inputs)
    budget = bench.judge(run, good, inputs, oracle, None).errors
    bad = good._replace(**{part: getattr(good, part) * 1.001})
    assert not bench.judge(run, bad, inputs, oracle, budget).right
    assert not bench.judge(run, bad, inputs, oracle, None).right


def test_one_bit_of_rouge_is_judged_wrong(rng_seed):
    bench = bench_rouge_l_recall.RougeLRecallBench(9)
    inputs = bench.make_inputs(rng_seed, CPU)
    oracle = bench.oracle(inputs)
    wrong = oracle.copy()
    wrong[4] = np.nextafter(wrong[4], 2)
    assert bench.judge(None, oracle, inputs, oracle, None).right
    assert not bench.judge(None, wrong, inputs, oracle, None).right


def test_oracle_gradients_are_autograds(rng_seed):
    generator = torch.Generator().manual_seed(rng_seed)
    # more tokens than one slice of the vocabulary
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8192 + 77, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8192 + 77, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 8191, 8192, 8192 + 76, 4000])
    token_weight = torch.randn(5, generator=generator)
    got = head_gradients(hidden, weight, target, token_weight, bias)
    nll = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target, reduction="none")
    want = torch.autograd.grad((token_weight * nll).sum(), [hidden, weight, bias])
    assert torch.allclose(got.nll, nll, rtol=1e-12)
    assert torch.allclose(got.hidden, want[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(got.weight.double(), want[1], rtol=1e-6, atol=1e-9)
    assert torch.allclose(got.bias.double(), want[2], rtol=1e-6, atol=1e-9)


def test_truncation_cuts_by_top_k_then_top_p_then_min_p():
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]]).log()
    assert truncated(logits).probability[0].tolist() == pytest.approx([0.4, 0.3, 0.1, 0.1, 0.1])
    # top-k first: what is left sums to 0.8, of which 0.5 + 0.375 reaches 0.8; top-p first would keep three
    assert truncated(logits, top_k=3, top_p=0.8).probability[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])
    assert truncated(logits, min_p=0.5).probability[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])
    assert truncated(logits, temperature=0.5).probability[0, 0].item() == pytest.approx(0.16 / 0.28)
    assert truncated(logits, temperature=0.0).probability[0].tolist() == [1, 0, 0, 0, 0]
    assert truncated(logits, top_k=2).allowed[0].tolist() == [True, True, False, False, False]


def test_counts_are_surprising_only_when_they_do_not_fit(rng_seed):
    generator = torch.Generator().manual_seed(rng_seed)
    probability = torch.cat([torch.rand(40, generator=generator).double(), torch.zeros(3)])
    probability /= probability.sum()
    allowed = torch.arange(43) < 42
    counts = torch.bincount(torch.multinomial(probability, 20000, True, generator=generator), minlength=43)
    assert abs(surprise_of_counts(counts, probability, allowed)) < 5
    shifted = probability.clone()
    shifted[0] += 0.02
    assert surprise_of_counts(counts, shifted / shifted.sum(), allowed) > 5
    seldom = torch.tensor([0.5, 0.5 - 1e-6, 1e-6], dtype=torch.double)
    assert surprise_of_counts(torch.tensor([500, 499, 1]), seldom, seldom > 0) < 1
    counts[41] = 9  # at the edge
    assert abs(surprise_of_counts(counts, probability, allowed)) < 5
    counts[42] = 1
    assert surprise_of_counts(counts, probability, allowed) == float("inf")


def test_ops_writes_its_schema(each_once, tmp_path, capsys, rng_seed):
    out = tmp_path / "ops.json"
    command = ["ops", "--op", "rouge_l_recall", "--repeats", "2", "--seed", str(rng_seed), "--json", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == ops.SCHEMA
    rows = {row["contestant"]: row for row in result["rows"]}
    assert list(rows) == ["pmc_fast", "pmc_fast, reference", "rouge_score", "rapidfuzz"]
    for name, row in rows.items():  # rapidfuzz need not be installed
        assert (row["right"] and row["seconds"]["median"] > 0) or (
            name == "rapidfuzz" and "rapidfuzz" in row["evidence"]
        )
    assert "rouge_score" in capsys.readouterr().out


def test_forward_time_and_share_of_the_limit(each_once):
    """One call per turn: the forward times are then those of the very calls that are timed, however busy the machine."""
    limits = measure_limits(CPU, [torch.float32])
    assert limits.bytes_per_s > 1e8 and limits.flops_per_s["float32"] > 1e8
    bench = CollapseLossBench(37, SMALL)
    runs = ops.contestants_of(bench, ["chunked torch"], CPU)
    assert list(runs) == ["pmc_fast", "torch eager", "chunked torch"]
    for row in ops.measure(bench, runs, CPU, 0, 3, 60.0, limits, lambda: None):
        assert 0 < row.forward.median < row.seconds.median
        least = max(row.flops / limits.flops_per_s["float32"], row.bytes / limits.bytes_per_s)
        assert row.share_of_limit == pytest.approx(least / row.seconds.median)
        assert row.flops == 6 * 37 * 24 * 1511 and row.bytes == 2 * 4 * 24 * (37 + 1511)


@pytest.mark.parametrize(("top_k", "chosen"), [(None, "cuda"), (50, "triton")])
@pytest.mark.parametrize("bench", [SampleBench, LinearSampleBench])
def test_what_is_chosen_for_the_options_does_not_run_twice(bench, top_k, chosen, monkeypatch):
    monkeypatch.setattr("pmc_fast.backend.why_not", lambda op, impl, *args: "for CPUs" if impl == "native" else None)
    runs = ops.contestants_of(bench(3, SMALL, Settings(top_k=top_k)), None, torch.device("cuda"))
    named = {f"pmc_fast, {impl}" for impl in ("native", "triton", "cuda", "reference")}
    assert named - set(runs) == {f"pmc_fast, {chosen}"}


def test_every_op_has_a_large_shape_and_a_small_one():
    for op in ops.OPS:
        sizes = {bench.large for bench in ops.benches_of(op)}
        assert False in sizes and (True in sizes or op == "rouge_l_recall")


def test_what_is_only_run_where_it_is_named():
    assert not set(ops.NAMED_ONLY) & set(ops.OPS)
    assert {bench.rows for bench in ops.benches_of("linear_sample_by_rows")} >= {16, 160, 256}
    assert all(bench.frozen for bench in ops.benches_of("linear_logprob_frozen"))
    assert {bench.prefix for bench in ops.benches_of("decode_attention_by_prefix")} == {64, 256, 1024, 4096}
    assert {bench.rows for bench in ops.benches_of("decode_attention_by_tiles")} == {16, 48, 96, 160}
    titles = [bench.title for bench in ops.benches_of("sample_by_options")]
    for size in ("160 x 128256", "32 x 128256", "160 x 49152"):
        assert len({title for title in titles if title.startswith(size)}) == 7


def test_sure_rows_have_one_token_far_above_the_others(rng_seed):
    bench = SampleByOptionsBench(40, SMALL, Settings(), sure=True)
    first, second = bench.make_inputs(rng_seed, CPU).topk(2).values.T
    sure = torch.arange(40) % 8 != 0
    assert (first - second)[sure].min() > ADVANTAGE - 1e-4
    assert (first - second)[~sure].max() < ADVANTAGE


def test_an_unknown_peer_is_refused_with_the_known(capsys):
    assert main(["ops", "--op", "rouge_l_recall", "--peer", "oracle"]) == 2
    error = capsys.readouterr().err
    known = "'pmc_fast, native', 'pmc_fast, reference', 'rapidfuzz', 'rouge_score'"  # quoted: some hold commas
    assert f"--peer: got 'oracle', want some of {known}\n" in error


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(limit, capsys):
    assert main(["ops", "--op", "rouge_l_recall", "--limit-s", limit]) == 2
    assert f"--limit-s: got {limit}, want more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_counts_that_are_none_are_refused(count, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ops", "--op", "rouge_l_recall", "--repeats", count])
    assert stop.value.code == 2
    assert f"--repeats: got {count}, want an integer of 1 or more" in capsys.readouterr().err


def test_memory_is_worded_as_in_the_report():
    spread = Spread(1.0, 1.0, 1.0)
    rows = [ops.Row("sample", "one", None, "pmc_fast", True, "", spread, 2, 1.0, peak) for peak in (53_200, 0)]
    printed = ops.table(rows)
    assert "53.2 kB" in printed and " MB" not in printed


def test_shapes_that_an_op_lacks_are_refused(capsys):
    assert main(["ops", "--op", "rouge_l_recall", "--shapes", "large"]) == 2
    assert "no benchmark of rouge_l_recall" in capsys.readouterr().err


def test_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ops", "--op", "softmax"])
    assert stop.value.code == 2
    assert "softmax" in capsys.readouterr().err
