"""How every benchmark measures: interleaved times, peak memory, and what the machine was."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pmc_fast.doctor import cpu_name, usable_cpus

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("pmc_fast", "torch", "transformers", "tokenizers", "numpy", "nltk", "rouge_score", "rapidfuzz", "triton")


@dataclass(frozen=True)
class Spread:
    """The median of some repeats, and their 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value; percentiles interpolate linearly between neighbours."""
        if not values:
            raise ValueError("values: got none, want at least one")
        ordered = sorted(values)
        return cls(statistics.median(ordered), _percentile(ordered, 0.2), _percentile(ordered, 0.8))


def times_as_long(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long as ours theirs took: the median over the turns, since a machine slows down for both of a turn.

    Where they took different numbers of turns, it is the medians' quotient.
    """
    if len(theirs) == len(ours):
        return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return statistics.median(theirs) / statistics.median(ours)


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """`with Stopwatch(device) as watch: ...` leaves the elapsed seconds, the device's own work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize(self._device)
        self.seconds = time.perf_counter() - self._start


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: torch.device,
    warmups: int = 1,
    at_least_s: float = 0.02,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, `repeats` of them, measured in turns.

    Turns keep a slow drift of the machine from favouring anyone; who goes first moves on by one each round. A call
    shorter than `at_least_s` is repeated within its turn and its mean taken, unless there are no warm-ups. `tick` is called after every turn.
    """
    names = list(contestants)
    calls = {}
    for name in names:
        seconds = at_least_s
        for _ in range(warmups):
            seconds = _seconds(contestants[name], 1, device)
        calls[name] = max(1, min(1000, round(at_least_s / max(seconds, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(contestants[name], calls[name], device))
            tick()
    return times


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _gpu_seconds(run, calls, device)
    with Stopwatch(device) as watch:
        for _ in range(calls):
            run()
    return watch.seconds / calls


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, whose replays cost the host one launch. The graph keeps the memory of its tensors.

    Raises RuntimeError if the call cannot be captured. Whether it waits for the GPU is tried before, since torch may end the
    process after a capture that failed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up once must not be captured
        run()
        with _refusing_waits():
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # the former is back if that fails
        run()
    return graph.replay


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Within a with block, torch raises RuntimeError instead of waiting for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far


def _gpu_seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """By events, each call finding nothing of the last one in the cache."""
    cold = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in marks:
        cold.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return sum(begin.elapsed_time(end) for begin, end in marks) / calls / 1e3


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` leaves in `peak.bytes` the most memory held at once, over what was held before.

    CUDA: the caching allocator's own high-water mark. CPU: the kernel's high-water mark of the process's resident
    memory (VmHWM, reset through /proc/self/clear_refs), so no allocator escapes it: C++ scratch and GEMM buffers
    count as much as tensors do, and a peak of a microsecond is seen. Free heap pages are returned to the system first
    (malloc_trim): otherwise glibc would serve the measured code from what earlier code left behind, and the peak would
    depend on who ran before. Where clear_refs is refused, a thread reads resident memory every millisecond, which can
    miss a short peak; where there is no /proc either, `bytes` is None. `PeakMemory.method(device)` says which it was.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._method = self.method(device)
        self.bytes: int | None = None

    @staticmethod
    def method(device: torch.device) -> str:
        """How `bytes` is found on this machine."""
        if device.type == "cuda":
            return "torch.cuda.max_memory_allocated"
        if _reset_high_water():
            return "VmHWM"
        return "statm every millisecond" if Path("/proc/self/statm").exists() else "none"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._method == "torch.cuda.max_memory_allocated":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._method == "VmHWM":
            _trim_heap()
            _reset_high_water()
            self._before = _status_bytes("VmRSS")
        elif self._method != "none":
            _trim_heap()
            self._before = _resident_bytes()
            self._watcher = _ResidentWatcher()
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._method == "torch.cuda.max_memory_allocated":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._method == "VmHWM":
            self.bytes = max(0, _status_bytes("VmHWM") - self._before)
        elif self._method != "none":
            self.bytes = max(0, self._watcher.stop() - self._before)


class _ResidentWatcher(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = 0

    def run(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _resident_bytes())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, _resident_bytes())


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def environment(device: torch.device, seed: int) -> dict[str, object]:
    """What a result depends on besides the code: machine, versions, commit, seed, threads and how busy it was."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "isa": _instruction_sets(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "seed": seed,
        "peak_memory": PeakMemory.method(device),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _instruction_sets() -> dict[str, str]:
    from pmc_fast.backend import missing_library
    from pmc_fast.native import library

    used = {"torch": torch.backends.cpu.get_cpu_capability()}
    return used if missing_library() else {**used, "pmc_fast": library().instruction_set()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> dict[str, object] | None:
    """The commit of the source tree and whether it was changed since; None outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
