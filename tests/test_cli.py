"""The command line: what it writes, and how it refuses bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from pmc_fast import cli, commands
from pmc_fast.data import QA, read_jsonl, write_jsonl
from pmc_fast.ledger import Entry, Ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_seed):
    folder = tmp_path_factory.mktemp("cli")
    make_model(seed=module_seed).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name in ("forget", "retain", "paraphrased", "world_facts", "authors"):
        write_jsonl(folder / f"{name}.jsonl", [QA(f"{name} {c}?", f"It is {c}.") for c in "abc"])
    return folder


@pytest.fixture
def files(folder, module_seed):
    """A model and its data, the same for all tests here."""
    print(f"PMC_FAST_TEST_SEED={module_seed}")
    return folder


def test_a_failure_shows_what_made_the_model(capsys, files):
    seed = int(capsys.readouterr().out.removeprefix("PMC_FAST_TEST_SEED="))
    made = make_model(seed=seed).state_dict()
    assert all(torch.equal(made[name], held) for name, held in load_file(files / "model" / "model.safetensors").items())


def unlearn(files, out, *more, **changed):
    given = {"model": files / "model", "forget": files / "forget.jsonl", "retain": files / "retain.jsonl", "out": out}
    given |= changed
    quick = "--epochs 2 --batch-size 2 --num-samples 3 --max-new-tokens 5 --evaluation-tokens 4 --device cpu"
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["unlearn", *words, *quick.split(), *more]


def refused(capsys, arguments, *expected):
    """Exit code 2 and one message on stderr that says all of `expected`."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith(f"pmc-fast {arguments[0]}: ")
    for text in expected:
        assert text in error, error


def test_unlearn_writes_model_metrics_and_report(files, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sets = ["--paraphrased", str(files / "paraphrased.jsonl"), "--utility", str(files / "world_facts.jsonl")]
    more = [*sets, "--utility", str(files / "authors.jsonl"), "--lr", "1e-2"]
    assert cli.main(unlearn(files, tmp_path / "out", *more)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report) == ["config", "environment", "before", "after", "timing"]
    for when in ("before", "after"):
        measured = report[when]
        assert measured["utility_sets"].keys() == {"world_facts", "authors"}
        forgotten = (measured["forget_rouge_l"] + measured["paraphrased_rouge_l"]) / 2
        assert measured["unlearn_quality"] == pytest.approx(100 * (1 - forgotten))
        known = [measured["retain_rouge_l"], *measured["utility_sets"].values()]
        assert measured["utility"] == pytest.approx(100 * sum(known) / 3)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2]
    for record in metrics:
        assert {"score", "collapse_loss", "retain_loss", "learning_rate", "seconds"} <= record.keys()
    assert report["timing"]["sample"] >= sum(record["seconds"]["sample"] for record in metrics) - 1e-9 > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token_id == 257
    original = AutoModelForCausalLM.from_pretrained(files / "model")
    changes = zip(model.parameters(), original.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in changes)
    assert "unlearn quality" in capsys.readouterr().out


def test_unlearn_tells_what_it_works_on(files, tmp_path, capsys):
    assert cli.main(unlearn(files, tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert "3 questions to forget, 3 rows to keep; tags prompts; float32 on cpu\nscore: " in told.err
    assert "ROUGE-L: the share of a true answer's words" in told.out


def test_answers_that_stay_are_told(capsys):
    ledger = Ledger(["a?", "b?", "c?"], ["He writes.", "She sings.", "They paint."])
    for question, text, score in ((2, "They paint", 1.0), (0, "Maybe he writes.", 1.0), (1, "She", 0.5 + math.exp(-1))):
        ledger.offer(question, Entry(text, (1,), score))
    commands._tell_of_what_stays(ledger)
    assert capsys.readouterr().err.startswith(
        "2 of 3 questions: the best answer drawn says all that the model said first"
    )
    for question, text in ((0, "Nothing."), (2, "They sleep.")):
        ledger.offer(question, Entry(text, (1,), 0.0))
    commands._tell_of_what_stays(ledger)
    assert not capsys.readouterr().err


def test_a_comparison_in_columns(capsys):
    before = {"unlearn_quality": 12.344, "utility": 100.0, "forget_rouge_l": 0.87654, "retain_rouge_l": 1.0}
    after = {"unlearn_quality": 99.0, "utility": 87.5, "forget_rouge_l": 0.01, "retain_rouge_l": 0.75}
    report = {
        "before": {**before, "utility_sets": {"world": 0.5}},
        "after": {**after, "utility_sets": {"world": 0.25}},
    }
    commands.print_comparison(report)
    assert capsys.readouterr().out.splitlines()[:7] == [
        "                   before   after",
        "---------------------------------",
        "unlearn quality %   12.34   99.00",
        "utility %          100.00   87.50",
        "forget ROUGE-L     0.8765  0.0100",
        "retain ROUGE-L     1.0000  0.7500",
        "world ROUGE-L      0.5000  0.2500",
    ]
    for when in ("before", "after"):
        report[when]["paraphrased_rouge_l"] = 0.5
    commands.print_comparison(report)
    assert "paraphrased ROUGE-L  0.5000  0.5000" in capsys.readouterr().out
    commands._finetune_table({"before": {"rouge_l": 0.25}, "after": {"rouge_l": 0.5}})
    assert "ROUGE-L on the data  0.2500  0.5000" in capsys.readouterr().out


def test_finetune_learns(files, tmp_path):
    more = ["--epochs", "30", "--batch-size", "3", "--lr", "1e-2", "--device", "cpu", "--evaluation-tokens", "16"]
    data = ["--data", str(files / "retain.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(["finetune", "--model", str(files / "model"), *data, *more]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and losses[-1] < losses[0] / 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["after"]["rouge_l"] >= report["before"]["rouge_l"]


def test_evaluate_writes_json_before_it_prints(files, tmp_path, capsys, monkeypatch):
    """A terminal may lack the letters of a set's name, and what was measured would be lost."""
    show, written = commands.print_table, []
    monkeypatch.setattr(
        commands, "print_table", lambda *table: written.append((tmp_path / "out.json").exists()) or show(*table)
    )
    options = ["--leakage", "4", "--prefill", "It is", "--evaluation-tokens", "4", "--device", "cpu"]
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    command = ["evaluate", "--model", str(files / "model"), *sets, *options, "--json", str(tmp_path / "out.json")]
    assert cli.main(command) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert 0 <= results["leakage"] <= 1 and written == [True]
    assert f"{results['utility']:.2f}" in capsys.readouterr().out


def test_warnings_are_shown_as_errors_are(files, capsys):
    """Of this library: by their message alone. Others' keep their place."""
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl"), "--evaluation-rows", "1"]
    command = ["evaluate", "--model", str(files / "model"), *sets, "--device", "cpu", "--evaluation-tokens", "200"]
    show = warnings.showwarning
    assert cli.main(command) == 0 and warnings.showwarning is show
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (warned,) = [line for line in told if "more than 128 tokens" in line]
    assert warned.startswith("pmc-fast evaluate: warning: max_new_tokens or max_length: prompt and answer may have")
    with pytest.warns(DeprecationWarning, match="^old$") as others, cli._warning("evaluate"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert [one.filename for one in others] == [__file__] and not capsys.readouterr().err


def test_evaluate_looks_at_the_first_rows_alone(files, monkeypatch):
    seen, options = {}, {}
    monkeypatch.setattr(
        "pmc_fast.commands.leakage",
        lambda lm, prompts, forget, **given: seen.update(leakage=forget) or options.update(given) or 0.5,
    )
    measure = commands.measure
    monkeypatch.setattr(
        "pmc_fast.commands.measure", lambda *given, **sets: seen.update(sets) or measure(*given, **sets)
    )
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    command = ["evaluate", "--model", str(files / "model"), *sets, "--device", "cpu", "--evaluation-tokens", "4"]
    assert cli.main([*command, "--leakage", "4", "--evaluation-rows", "2"]) == 0
    assert seen["leakage"] == seen["forget"] == read_jsonl(files / "forget.jsonl")[:2]
    assert seen["retain"] == read_jsonl(files / "retain.jsonl")[:2]
    assert seen["max_new_tokens"] == 4 and {*options} == {
        "num_samples",
        "prefill",
        "max_new_tokens",
        "seed",
        "progress",
    }
    more = ["--leakage", "4", "--evaluation-rows", "0", "--prefill", "It is", "--seed", "3"]
    assert cli.main([*command, *more]) == 0
    assert len(seen["leakage"]) == 3
    options.pop("progress")
    assert options == {"num_samples": 4, "prefill": "It is", "max_new_tokens": 4, "seed": 3}


@pytest.mark.parametrize("out", [".", "missing/out.json", "forget.jsonl/out.json"])
def test_json_that_cannot_be_written_is_refused_before_the_model_is_loaded(files, capsys, out):
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    refused(capsys, ["evaluate", "--model", "/no/model", *sets, "--json", str(files / out)], "--json: ")


def test_json_never_takes_the_place_of_rows(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    command = ["evaluate", "--model", "/no/model", *sets, "--json", "forget.jsonl"]
    refused(capsys, command, "--json: forget.jsonl is a file that rows are read from")


def test_json_takes_the_place_of_earlier_results_and_of_nothing_else_of_the_model(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[]")
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--model", "model", *sets, "--json"]
    refused(capsys, [*command, "model/config.json"], "--json: model/config.json is a file of the model")
    for name, held in (("new.json", None), ("earlier.json", '{"unlearn_quality": 1}')):
        if held:
            (tmp_path / "model" / name).write_text(held)
        refused(capsys, [*command, f"model/{name}"], "model: ")  # whose config.json is none


@pytest.mark.parametrize("command", ["finetune", "unlearn"])
def test_rows_of_a_run_come_from_files_that_can_be_read_again(files, tmp_path, capsys, command):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=[(files / "retain.jsonl").read_bytes()], daemon=True)
    writer.start()
    words = unlearn(files, tmp_path / "out", model="/no/model", retain=fifo)
    if command == "finetune":
        words = ["finetune", "--model", "/no/model", "--data", str(fifo), "--out", str(tmp_path / "out")]
    refused(capsys, words, "fifo: not a plain file", "--resume")
    assert not (tmp_path / "out").exists()


def test_words_that_are_no_text_are_refused(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(unlearn(files, f"{tmp_path}/out\udcff"))
    assert end.value.code == 2
    assert r"out\udcff', expected UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["unlearn", "finetune", "demo"])
def test_an_out_folder_that_cannot_be_made(files, capsys, command):
    out = files / "forget.jsonl" / "out"
    words = {
        "unlearn": unlearn(files, out, model="/no/model"),
        "finetune": ["finetune", "--model", "/no/model", "--data", str(files / "retain.jsonl"), "--out", str(out)],
        "demo": ["demo", "--out", str(out)],
    }
    refused(capsys, words[command], str(out), "is not a folder", "choose another --out")


def test_doctor_names_every_op_and_reason(capsys):
    from pmc_fast import backend

    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed  # what follows is in the metadata of some builds only
    for op in backend.IMPLEMENTATIONS:
        assert op in printed
        for name in backend.PACKAGES:
            reason = backend.why_not(op, name)
            assert reason is None or reason in printed


def test_help_needs_no_torch():
    code = "import sys, pmc_fast.cli as c; c.make_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(filter(None, sys.path))}).returncode
        == 0
    )


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_reads_ends_it_quietly(buffered):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["PYTHONUNBUFFERED"] = "" if buffered else "1"
    command = [sys.executable, "-m", "pmc_fast", "doctor"]
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_was_closed_before(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["doctor"]) == 0


@pytest.mark.parametrize("command", ["demo", "finetune", "unlearn", "evaluate", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ":"),
        ('{"question": "a?", "answer": "b"}\n{"question": "c?"}\n', ":2:"),
        ('{"answer": "b"}\n', ":1:"),
        ('{"question": "a?", "answer": "b"}\n\nnot json\n', ":3:"),
        ("[1, 2]\n", ":1:"),
        ('{"question": "", "answer": "b"}\n', ":1:"),
    ],
)
@pytest.mark.parametrize("which", ["forget", "retain"])
def test_bad_data_is_named(files, tmp_path, capsys, text, expected, which):
    (tmp_path / "bad.jsonl").write_text(text)
    refused(capsys, unlearn(files, tmp_path / "out", **{which: tmp_path / "bad.jsonl"}), f"bad.jsonl{expected}")
    assert not (tmp_path / "out").exists()


def test_missing_data(files, tmp_path, capsys):
    refused(capsys, unlearn(files, tmp_path / "out", forget=tmp_path / "none.jsonl"), "none.jsonl", "no such file")


HUGE = "99999999999999999999"


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "option, value, wanted",
    [
        *(("num-samples", value, "an integer in [1, 2147483647]") for value in ("0", HUGE)),
        *(("top-p", value, "a number in (0, 1]") for value in ("0", "1.5", "nan", "inf")),
        *(("temperature", value, "a number in [1.175e-38") for value in ("-1", "nan", "inf", "1e-40")),
        ("top-k", "-1", "at least 0"), ("top-k", HUGE, "at most 2147483647"),
        *(("min-p", value, "a number in [0, 1]") for value in ("2", "-0.1", "nan")),
        *(("tau", value, "a finite number above 0") for value in ("0", "inf", "nan")),
        *((name, value, "an integer in [1, 2147483647]") for name in ("epochs", "batch-size", "accumulation")
          for value in ("0", HUGE)),
        *((name, value, "a finite number of at least 0") for name in ("learning-rate", "lr", "retain-weight", "lambda",
          "weight-decay", "warmup-epochs") for value in ("-1", "nan", "inf")),
        *((name, value, "an integer in [1, 2147483647]") for name in ("max-length", "max-new-tokens")
          for value in ("0", HUGE)),
        *((name, "-1", "an integer in [0, 2147483647]") for name in ("min-words", "min-len")),
        ("seed", "-1", "at least 0"), ("threads", "0", "at least 1"), ("checkpoint-every", "0", "at least 1"),
        ("evaluation-rows", "-1", "at least 0"), ("evaluation-tokens", "0", "at least 1"),
        ("evaluation-tokens", HUGE, "at most 2147483647"), ("device", "", "auto, cpu, cuda or cuda:N"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named_by_the_option_as_typed(
    files, tmp_path, capsys, option, value, wanted, joined, monkeypatch
):
    monkeypatch.setattr("pmc_fast.training.unlearn", None)
    words = [f"--{option}={value}"] if joined or not value else [f"--{option}", value]
    assert cli.main(unlearn(files, tmp_path / "out", *words)) == 2
    (told,) = capsys.readouterr().err.splitlines()
    number = float(value) if value and option != "device" else None
    got = {value, repr(value), str(number)}
    assert any(told.startswith(f"pmc-fast unlearn: --{option}: got {one}, expected {wanted}") for one in got), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["model", "forget", "retain", "paraphrased", "utility", "out", "json"])
def test_names_of_files_that_are_empty(files, tmp_path, capsys, option):
    words = unlearn(files, tmp_path / "out")
    if option == "json":
        words = ["evaluate", *words[1:7]]
    refused(capsys, [*words, f"--{option}="], f": --{option}: got '', expected the name of a file or folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["forget.jsonl", "forget.jsonl/x", "n" * 300, "/" + "n" * 300])
def test_a_model_that_is_no_folder(files, tmp_path, capsys, name):
    given = name if name.startswith("n") else files / name
    expected = "it is a file" if name == "forget.jsonl" else "cannot be loaded" if name[0] == "n" else "no such folder"
    refused(capsys, unlearn(files, tmp_path / "out", model=given), f"unlearn: {given}: ", expected)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*.safetensors", "no weights"),
        ("config.json", "no config.json"),
        ("token*", "no tokenizer"),
        ("*", "config.json"),
    ],
)
def test_model_folder_that_lacks_a_part(files, tmp_path, capsys, pattern, expected):
    shutil.copytree(files / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob(pattern):
        path.unlink()
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "model"), str(tmp_path / "model"), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("tokenizer_config.json", None, [1], "the tokenizer cannot be loaded: "),
        (
            "config.json",
            "num_attention_heads",
            "x",
            "cannot be loaded: Validation error for field 'num_attention_heads': ",
        ),
        ("config.json", "num_attention_heads", 0, "cannot be loaded: "),
    ],
)
def test_a_model_folder_with_a_damaged_file(files, tmp_path, capsys, name, key, value, expected):
    shutil.copytree(files / "model", tmp_path / "model")
    file = tmp_path / "model" / name
    held = value if key is None else {**json.loads(file.read_text()), key: value}
    file.write_text(json.dumps(held))
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "model"), f"{tmp_path}/model: ", expected)


def test_the_folder_of_a_run_in_place_of_its_model(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "run" / "model")
    model = tmp_path / "run"
    refused(
        capsys, unlearn(files, tmp_path / "out", model=model), f"{model}: no config", f"did you mean {model}/model?"
    )
    (model / "config.json").write_text("{}")
    refused(capsys, unlearn(files, tmp_path / "out", model=model), f"{model}: no weights", f"mean {model}/model?")


def test_a_folder_called_as_an_option(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("x")
    refused(capsys, unlearn(files, "model"), "unlearn: model: the folder is not empty")
    data = ["--data", str(files / "retain.jsonl"), "--out", "model"]
    refused(capsys, ["finetune", "--model", str(files / "model"), *data], "finetune: model: the folder")


def test_missing_model_folder(files, tmp_path, capsys):
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "none"), "no such folder")


def test_weights_cut_short(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "model"), "cannot be loaded")


def test_weights_that_lack_a_tensor(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    save_file(
        {k: v for k, v in weights.items() if k != name}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "model"), "lack", name)


@pytest.mark.parametrize("command", ["unlearn", "finetune", "evaluate"])
def test_weights_that_are_nan(files, tmp_path, capsys, command):
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({k: v * math.nan for k, v in weights.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    words = unlearn(files, tmp_path / "out", model=tmp_path / "model")
    if command == "finetune":
        words = [*words[1:3], "--data", str(files / "retain.jsonl"), "--out", str(tmp_path / "out")]
    if command == "evaluate":
        words = words[1:7]
    refused(capsys, [command, *words[command == "unlearn" :]], f"{command}: --model: its logits are NaN")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_tokens_that_the_model_has_not(files, tmp_path, capsys, which):
    shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [QA("What?", "That."), QA("Who zzz?", "He.") if which == "forget" else QA("Who?", "zzz")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    changed = {"model": tmp_path / "model", which: tmp_path / "rows.jsonl"}
    expected = (
        f"--{which}: 'Who{' zzz' * (which == 'forget')}?' ({tmp_path}/rows.jsonl:2): the tokenizer makes token 259"
    )
    refused(capsys, unlearn(files, tmp_path / "out", **changed), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--threads", "100000000"], "--threads: got 100000000, expected at most 4096"),
        (["--seed", str(2**63)], f"--seed: got {2**63}, expected at most {2**63 - 1}"),
    ],
)
def test_numbers_out_of_range(files, tmp_path, capsys, words, expected):
    refused(capsys, unlearn(files, tmp_path / "out", *words), expected)
    if words[0] == "--seed":
        refused(capsys, ["demo", "--out", str(tmp_path / "out"), *words], expected)
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_an_end_token(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    refused(capsys, unlearn(files, tmp_path / "out", model=tmp_path / "model"), "end token")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(files, tmp_path, capsys):
    refused(capsys, unlearn(files, tmp_path / "out", "--device", "cuda"), "cuda", "--device cpu")


def test_device_that_is_none(files, tmp_path, capsys):
    refused(capsys, unlearn(files, tmp_path / "out", "--device", "abacus"), "abacus")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_out_folder_in_use(files, tmp_path, capsys, more):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    refused(capsys, unlearn(files, tmp_path / "out", *more), "not empty")


def test_out_folder_with_another_run(files, tmp_path, capsys):
    assert cli.main(unlearn(files, tmp_path / "out")) == 0
    capsys.readouterr()
    refused(capsys, unlearn(files, tmp_path / "out"), "another run", "--resume")
    refused(capsys, unlearn(files, tmp_path / "out", "--seed", "5", "--resume"), "seed was 0, now 5")
    refused(capsys, ["demo", "--out", str(tmp_path / "out")], "another run")
    refused(capsys, ["demo", "--out", str(tmp_path / "out"), "--resume"], "a run of unlearn, not of demo")


def without(command, option):
    at = command.index(option)
    return command[:at] + command[at + 2 :]


def test_prompts_longer_than_the_limit_are_refused_before_the_evaluation(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pmc_fast.commands.measure", None)
    command = without(unlearn(files, tmp_path / "out"), "--max-new-tokens")
    refused(capsys, [*command, "--max-length", "10"], "--max-length: got 10", "leaves no room", "'forget a?'")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert cli.main([*command, "--max-length", "40"]) == 0


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--max-length", "90"], "--max-length, --max-new-tokens: got both"),
        (["--tau", "0.5"], "--tau: it belongs to --selection bradley_terry"),
        (["--selection", "bradley_terry", "--prune"], "--prune: it needs --selection best"),
        (["--prompt", "chat"], "--prompt: got chat, but the tokenizer has no chat template"),
        (["--system", "Be brief."], "--system: it opens chat prompts, and these are tags"),
    ],
)
def test_options_that_contradict_each_other(files, tmp_path, capsys, more, expected):
    refused(capsys, unlearn(files, tmp_path / "out", *more), expected)
    assert not (tmp_path / "out").exists()


def test_forget_questions_that_are_retained_are_told_of(files, tmp_path, capsys):
    both = tmp_path / "both.jsonl"
    write_jsonl(both, [QA("forget a? ", "Kept."), *read_jsonl(files / "retain.jsonl")])
    assert cli.main(unlearn(files, tmp_path / "out", retain=both)) == 0
    assert "1 of 3 questions of --forget are in --retain too" in capsys.readouterr().err
    assert cli.main(unlearn(files, tmp_path / "other")) == 0
    assert "are in --retain too" not in capsys.readouterr().err


def test_a_model_that_its_last_step_broke(files, tmp_path, capsys, monkeypatch):
    """Nothing but the measuring notices."""

    def broken(pmc, *given, **options):
        with torch.no_grad():
            pmc.lm.head_module.weight.fill_(math.nan)
        return {}

    monkeypatch.setattr("pmc_fast.training.unlearn", broken)
    assert cli.main(unlearn(files, tmp_path / "out")) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("pmc-fast unlearn: after: ") and told.endswith("; try a lower --learning-rate")


def test_two_utility_sets_of_one_name(files, tmp_path, capsys):
    refused(capsys, unlearn(files, tmp_path / "out", "--utility", str(files / "retain.jsonl")), "named retain")


def test_prefill_without_leakage(files, capsys):
    sets = ["--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.jsonl")]
    refused(capsys, ["evaluate", "--model", str(files / "model"), *sets, "--prefill", "It is"], "--leakage")
