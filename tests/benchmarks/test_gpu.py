"""`python -m benchmarks gpu`: the plan, rehearsed on the CPU, and what a run cut short leaves behind."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from collectives import forking

from benchmarks import build, gpu, limits, report
from benchmarks.__main__ import main
from benchmarks.gpu import Part
from benchmarks.random_models import SHAPES, make

FORKED = ("benchmarks", "benchmarks.random_models")  # modules whose start would take longer than what they do


class Fork:
    """`python -m MODULE ...` in a fork, as subprocess.Popen has it; the report starts as any program does."""

    def __new__(cls, command, **options):
        _, m, module, *words = command
        forked = m == "-m" and module in FORKED and words[:1] != ["report"]
        return super().__new__(cls) if forked else subprocess.Popen(command, **options)

    def __init__(self, command, *, cwd, env, stdout, **options):
        self.command = command
        self.process = forking().Process(target=run_module, args=(command[2:], cwd, env, stdout.name))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode


def run_module(words, cwd, env, log):
    os.setsid()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    limits._REPEATS, limits._SIZES["cpu"] = 1, 256  # nobody reads them
    sys.argv, sys.path[:0] = words, [str(cwd)]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of a whole rehearsal, its exit status, and what was printed."""
    out, printed = tmp_path_factory.mktemp("rehearsal") / "out", io.StringIO()
    stand_in = SimpleNamespace(
        Popen=Fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
    )
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(gpu, "subprocess", stand_in)
        status = main(["gpu", "--device", "cpu", "--minutes", "60", "--out", str(out)])
    return out, status, printed.getvalue()


def summary(out):
    content = json.loads((out / gpu.SUMMARY).read_text())
    assert content["schema"] == gpu.SCHEMA
    return content, {part["name"]: part for part in content["parts"]}


def test_a_rehearsal_runs_every_part(rehearsal):
    out, status, printed = rehearsal
    assert status == 0, printed
    content, parts = summary(out)
    assert (
        content["device"] == "cpu"
        and content["command"] == "python -m benchmarks gpu --device cpu --minutes 60 --out out"
    )
    kinds = ["model", "step", "sampling", "train", "profile"]
    names = ["build", "tests", "ops", *(f"{kind}-tiny" for kind in kinds), "report"]
    assert list(parts) == names and all(f"{name} " in printed for name in names)
    for part in parts.values():
        assert part["status"] == "ok" and part["exit_code"] == 0 and 0 < part["seconds"] < part["limit_s"]
        assert (out / part["log"]).exists() and str(out) in part["command"] or part["name"] in ("build", "report")


def test_a_rehearsal_leaves_results_traces_and_a_report_but_no_models(rehearsal):
    out, *_ = rehearsal
    _, parts = summary(out)
    for name in ("ops", "step-tiny", "sampling-tiny", "train-tiny", "profile-tiny"):
        assert parts[name]["results"] == [f"{name}.json"] and report.sections(out / f"{name}.json")
        assert f"### {name}: " in (out / "report" / "report.md").read_text()
    config = json.loads((out / "step-tiny.json").read_text())["config"]
    assert config["model"] == "tiny" and config["forget"] == "tiny-forget.jsonl"
    assert (out / "profile-tiny.trace.json.gz").stat().st_size and "<testsuite" in (out / "tests.xml").read_text()
    assert not (out / "models").exists()


def test_a_folder_that_holds_another_run_is_refused(rehearsal, capsys):
    out, *_ = rehearsal
    before = (out / gpu.SUMMARY).read_bytes()
    assert main(["gpu", "--device", "cpu", "--out", str(out)]) == 2
    assert f"--out: {out} holds another run" in capsys.readouterr().err
    assert (out / gpu.SUMMARY).read_bytes() == before


def test_the_plan_for_a_gpu_covers_both_models_and_every_op(tmp_path):
    parts = {part.name: part for part in gpu.plan(tmp_path, "cuda:1", "cuda")}
    assert list(parts)[:2] == ["build", "tests"] and list(parts)[-1] == "report"
    for shape in ("llama-3.2-3b", "smollm2-135m"):
        assert {parts[f"{kind}-{shape}"].needs for kind in ("step", "sampling", "train", "profile")} == {
            f"model-{shape}"
        }
    for part in parts.values():
        assert "cuda:1" in part.words or part.tool or part.name in ("build", "tests", "report")
    assert "bfloat16" in parts["ops"].words and "sample" in parts["ops-sample"].words
    assert "linear_sample_by_rows" in parts["ops-linear-sample"].words
    assert {"decode_attention_by_prefix", "--graphs"} <= set(parts["ops-decode-attention"].words)
    assert {"decode_attention_by_tiles", "--graphs"} <= set(parts["ops-decode-tiles"].words)
    assert {"sample_by_options", "--graphs"} <= set(parts["ops-sample-options"].words)
    assert len(parts["report"].inputs) == 14
    from benchmarks.__main__ import _parse

    for part in parts.values():
        if list(part.words[:2]) == ["-m", "benchmarks"]:
            _parse([*part.words[2:], *map(str, part.inputs)])  # every option is known


def test_what_the_tests_leave_out_is_not_a_gpus(tmp_path):
    parts = {part.name: part for part in gpu.plan(tmp_path, "cuda", "cuda")}
    left_out = [word.removeprefix("--ignore=") for word in parts["tests"].words if word.startswith("--ignore=")]
    assert set(left_out) == {"tests/ops/test_packed_attention.py", "tests/ops/test_rouge_l_recall.py"}
    assert all((gpu.ROOT / one).exists() for one in left_out)


def test_the_cuda_kernels_are_watched(tmp_path):
    parts = {part.name: part for part in gpu.plan(tmp_path, "cuda", "cuda") if part.tool}
    assert list(parts) == ["memcheck", "racecheck"]
    for name, part in parts.items():
        tool, *options = part.under[part.under.index(part.tool) :]
        given = dict(zip(options[::2], options[1::2], strict=True))  # each has a value
        assert tool == "compute-sanitizer" and given["--tool"] == name
        assert given["--kernel-name"] == "kernel_substring=pmc4cuda"
        files = [word for word in part.words if word.endswith(".py")]
        assert files and all((gpu.ROOT / file).exists() for file in files)


def python(name, code, share=1.0, **more):
    """A part that starts at once, without what is installed: on a busy machine, too, long before its time is up."""
    return Part(name, ["-I", "-S", "-c", code], share, **more)


def take(parts, out, seconds):
    return {outcome.name: outcome for outcome in gpu.take(parts, out, time.monotonic() + seconds, {})}


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def ends(pid):
    """Whether a process that was killed is gone, or will be: the signal has to reach it."""
    until = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_others_go_on_when_a_part_fails_or_takes_too_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    ready = tmp_path / "ready.json"
    parts = [
        python("model", "import sys; print('one\\ntwo', flush=True); sys.exit(3)", 20.0),
        python("needs", "pass", needs="model"),
        python("slow", STUBBORN),
        python("writes", f"open({str(ready)!r}, 'w').write('1')", 20.0, results=[ready]),
        python("reads", "import sys; print(sys.argv[1:])", 20.0, inputs=[ready, tmp_path / "never.json"]),
        python("reads-nothing", "pass", 20.0, inputs=[tmp_path / "never.json"]),
    ]
    found = take(parts, tmp_path, 200.0)  # of which the slow one gets 3
    assert {name: outcome.status for name, outcome in found.items()} == {
        "model": "failed",
        "needs": "not started: model failed",
        "slow": "cut short",
        "writes": "ok",
        "reads": "ok",
        "reads-nothing": "not started: there are no results",
    }
    assert found["model"].exit_code == 3 and found["writes"].results == ["ready.json"]
    assert (tmp_path / "reads.log").read_text().strip() == str([str(ready)])
    assert ends(int((tmp_path / "slow.log").read_text()))
    printed = capsys.readouterr().out
    assert "model          failed" in printed and "    one\n    two\n" in printed
    _, written = summary(tmp_path)
    assert written["slow"]["status"] == "cut short" and written["slow"]["seconds"] < 300


def test_a_part_that_is_told_to_stop_can_write_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE_S", 300)
    code = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('saved')"
    assert take([python("part", code)], tmp_path, 3.0)["part"].status == "cut short"
    assert (tmp_path / "part.log").read_text() == "saved\n"


def test_a_part_runs_under_another_command(tmp_path):
    part = python("part", "import os; print(os.environ['WATCHED'])", under=["env", "WATCHED=yes"])
    assert take([part], tmp_path, 100.0)["part"].command.startswith(f"WATCHED=yes {sys.executable}")
    assert (tmp_path / "part.log").read_text() == "yes\n"


def test_what_takes_a_tool_starts_only_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "plan", lambda *_: [python("a", "pass"), python("b", "pass", tool="no-such-tool")])
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "all")]) == 0
    assert list(summary(tmp_path / "all")[1]) == ["a"]
    assert main(["gpu", "--device", "cpu", "--only", "a", "b", "--out", str(tmp_path / "named")]) == 1
    assert "1 of 2 parts: b (not started: no-such-tool is not installed)" in capsys.readouterr().err


def test_no_part_starts_without_time_left(tmp_path):
    assert take([python("part", "pass")], tmp_path, -1.0)["part"].status == "not started: no time left"


def test_time_that_a_part_leaves_goes_to_the_later_ones(tmp_path):
    found = take([python("a", "pass", 30.0), python("b", "pass", 10.0), python("c", "pass", 10.0)], tmp_path, 500.0)
    assert found["a"].limit_s == pytest.approx(300, abs=30)
    assert found["b"].limit_s > 200 and found["c"].limit_s > 400


def test_a_run_that_is_ended_from_outside_keeps_its_summary_and_ends_its_part(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom benchmarks import gpu\n"
        f"out = Path({str(tmp_path)!r})\n(out / 'models').mkdir()\n"
        f"gpu.take([gpu.Part('first', ['-c', 'pass'], 1.0), gpu.Part('slow', ['-c', {STUBBORN!r}], 9.0)],"
        " out, time.monotonic() + 500, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "slow.log"
    until = time.monotonic() + 300
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    _, parts = summary(tmp_path)
    assert parts["first"]["status"] == "ok" and parts["slow"]["status"] == "interrupted"
    assert ends(int(log.read_text())) and not (tmp_path / "models").exists()


def test_a_part_that_fails_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "plan", lambda *_: [python("fine", "pass"), python("bad", "raise SystemExit(5)")])
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert "FAILED: 1 of 2 parts: bad (failed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--device", "toaster"], "device: got 'toaster'"),
        (["--device", "cpu", "--minutes", "0"], "--minutes: got 0"),
        (["--device", "cpu", "--out", "{file}"], "--out: "),
        (["--device", "cpu", "--out", "{tmp}"], "holds other files; want a new or an empty folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, complaint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = [option.format(file=tmp_path / "file", tmp=tmp_path) for option in options]
    assert main(["gpu", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "device: got 'cuda'" in capsys.readouterr().err


def test_text_of_a_random_model_gives_its_tokens_again(tmp_path, rng_seed):
    from pmc_fast.loading import load_model
    from pmc_fast.prompts import Prompts

    make(tmp_path / "tiny", "tiny", torch.device("cpu"), torch.float32, rng_seed % 1000)
    model, tokenizer = load_model(str(tmp_path / "tiny"))
    size = SHAPES["tiny"]["vocab_size"]
    assert len(tokenizer) == size == model.get_output_embeddings().weight.shape[0]
    prompts = Prompts(tokenizer)
    words = torch.randint(512, size, (30,)).tolist()
    assert prompts.answer_ids(prompts.decode(words)) == [*words, prompts.end_ids[0]]
    with torch.no_grad():
        logits = model(torch.randint(512, size, (4, 20))).logits
    assert 2.5 < logits.std() < 4.5


def test_what_is_missing_is_built_and_reported(monkeypatch, capsys):
    states, commands = iter(["no _C", None, None]), []
    monkeypatch.setattr(build, "missing", lambda: next(states))
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: commands.append(command[2:]))
    assert build.main() == 0
    installed, doctor = commands
    assert installed[:2] == ["pip", "install"] and installed[-2:] == ["-e", "."] and doctor == ["pmc_fast", "doctor"]
    assert capsys.readouterr().out == "missing: no _C\nnothing is missing\n\n"
    monkeypatch.setattr(build, "missing", lambda: "no _C")
    assert build.main() == 1 and "--no-build-isolation" in commands[3]


def test_nothing_is_missing_here():
    assert build.missing() is None
