"""Times, spreads and peak memory are what they say."""

import json
import time

import pytest
import torch

from benchmarks import limits, measure
from benchmarks.measure import PeakMemory, Spread, environment, interleave, times_as_long

CPU = torch.device("cpu")


def test_spread_interpolates():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 1.8, 4.2)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_a_ratio_compares_within_turns():
    ours, theirs = [1.0, 1.0, 2.0], [3.0, 6.0, 6.0]  # at half speed in the third turn, and for theirs in the second
    assert times_as_long(theirs, ours) == 3
    assert times_as_long([8.0], ours) == 8  # a single turn, over the median of ours


def test_contestants_take_turns_and_who_is_first_moves_on():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(runs, 4, device=CPU, at_least_s=0.0)
    assert calls[3:] == [*"abc", *"bca", *"cab", *"abc"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_is_short_is_called_often_and_its_mean_taken(monkeypatch):
    """By a clock that the contestants move: their first calls take longer, and later ones longer with each turn."""
    now, calls, turns = [0.0], {"short": [], "long": []}, []

    def runner(name, seconds):
        def run():
            calls[name].append(len(turns))
            now[0] += seconds * (5 if len(calls[name]) == 1 else 1 + len(turns) // 2)

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    runs = {"short": runner("short", 0.004), "long": runner("long", 0.03)}
    times = interleave(runs, 3, device=CPU, warmups=2, at_least_s=0.02, tick=lambda: turns.append(1))
    assert calls["short"] == [0, 0] + 5 * [0] + 5 * [3] + 5 * [4] and len(turns) == 6
    assert calls["long"] == [0, 0, 1, 2, 5]
    assert times["short"] == pytest.approx([0.004, 0.008, 0.012]) and times["long"] == pytest.approx([0.03, 0.06, 0.09])


def test_limits_count_reads_and_writes_and_two_operations_per_product(monkeypatch):
    seconds = iter([0.5, 8.0, 4.0, 4.0, 8.0])  # the copy, then each dtype's product by either way
    monkeypatch.setattr(limits, "_best", lambda work, device: next(seconds))
    got = limits.measure_limits(CPU, [torch.bfloat16])
    assert got.bytes_per_s == 2 * (256 << 20) / 0.5
    assert got.flops_per_s == dict.fromkeys(("float32", "bfloat16"), 2 * 256**3 / 4.0)
    assert got.seconds(got.flops_per_s["bfloat16"], 2 * got.bytes_per_s, "bfloat16") == 2.0
    assert got.seconds(3 * got.flops_per_s["float32"], 2 * got.bytes_per_s, "float32") == 3.0
    assert got.seconds(0.0, got.bytes_per_s, "of no rate") == 1.0


@pytest.mark.skipif(PeakMemory.method(CPU) == "none", reason="no /proc")
@pytest.mark.parametrize("method", ["VmHWM", "statm every millisecond"])
def test_peak_memory_counts_what_was_held_at_once(method, monkeypatch):
    if method != "VmHWM":
        monkeypatch.setattr(PeakMemory, "method", staticmethod(lambda device: method))
    elif PeakMemory.method(CPU) != method:
        pytest.skip("clear_refs is refused here")
    megabyte = 1 << 20
    held = torch.ones(64 * megabyte, dtype=torch.uint8)  # held before: must not count

    def work():
        for _ in range(3):
            a = torch.ones(96 * megabyte, dtype=torch.uint8)
            b = a + 1
            time.sleep(0.1)  # long enough for the thread that looks every millisecond, on a busy machine, too
            del a, b

    work()
    for _ in range(2):  # the second time glibc could serve it all from what the first left
        with PeakMemory(CPU) as peak:
            work()
        assert 2 * 96 <= peak.bytes / megabyte + 1 <= 2 * 96 + 24
    assert held.sum() == held.numel()


@pytest.mark.skipif(PeakMemory.method(CPU) == "none", reason="no /proc")
def test_what_was_freed_in_pieces_counts_again():
    """In the heap, where the allocator keeps it: a piece at the end is still held."""

    def pieces():
        return [torch.ones(60 << 10, dtype=torch.uint8) for _ in range(1000)]

    before = pieces()
    end = torch.ones(60 << 10, dtype=torch.uint8)
    del before
    with PeakMemory(CPU) as peak:
        again = pieces()
    assert peak.bytes > 0.8 * sum(piece.nbytes for piece in again) and end.all()


def test_environment_can_be_written_as_json():
    where = environment(CPU, 7)
    assert json.loads(json.dumps(where)) == where
    assert where["seed"] == 7 and where["threads"] == torch.get_num_threads()
    assert where["versions"]["torch"].startswith(torch.__version__.split("+")[0])
