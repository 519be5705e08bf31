"""Every option of the command line reaches what it is for: the configuration, the training, the loading of a model."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from tiny import make_model, make_tokenizer

from pmc_fast import PMCConfig, UserError, cli, commands
from pmc_fast.data import QA, write_jsonl


@pytest.fixture
def files(tmp_path):
    for name in ("forget", "retain"):
        write_jsonl(tmp_path / f"{name}.jsonl", [QA(f"{name} {c}?", f"It is {c}.") for c in "abc"])
    return tmp_path


def inputs(files, command):
    """The options that say where rows come from and where results go."""
    rows = {"finetune": {"data": "retain.jsonl"}}.get(command, {"forget": "forget.jsonl", "retain": "retain.jsonl"})
    places = rows if command == "evaluate" else {**rows, "out": "out"}
    return [word for name, place in places.items() for word in (f"--{name}", str(files / place))]


# For every hyperparameter an option and a value that is neither preset's.
OPTIONS = {
    "retain_weight": 0.7,
    "num_samples": 3,
    "temperature": 0.6,
    "top_k": 11,
    "top_p": 0.7,
    "min_p": 0.2,
    "min_words": 2,
    "max_length": 77,
    "max_new_tokens": 9,
    "selection": "bradley_terry",
    "tau": 0.3,
    "keep_truncated": False,
    "prune": False,
    "reencode": False,
    "epochs": 4,
    "batch_size": 6,
    "accumulation": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.2,
    "warmup_epochs": 0.5,
    "seed": 8,
}


def config_of(files, monkeypatch, *more, command="unlearn"):
    """The configuration that a command would run with."""

    def stop(options, config):
        raise UserError(json.dumps(asdict(config)))

    monkeypatch.setattr(commands, "_prepare", stop)
    options = cli.make_parser().parse_args([command, "--model", "m", *inputs(files, command), *more])
    with pytest.raises(UserError) as stopped:
        getattr(commands, command)(options)
    return json.loads(str(stopped.value))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_hyperparameter_is_an_option(files, monkeypatch, name):
    value, option = OPTIONS[name], "--" + name.replace("_", "-")
    words = [option.replace("--", "--no-", 1)] if value is False else [option, str(value)]
    more = ["--selection", "bradley_terry"] if name == "tau" else []
    presets = [asdict(PMCConfig.published(preset)) for preset in ("llama-3.2-3b", "phi-1.5")]
    assert all(preset[name] != value for preset in presets)
    found = config_of(files, monkeypatch, *words, *more)
    assert found[name] == value
    changed = {key for key in found if found[key] != presets[0][key]}
    assert changed <= {name, "selection"} | ({"max_length"} if name == "max_new_tokens" else set())


def test_no_hyperparameter_is_left_out():
    assert OPTIONS.keys() | {"prompt_style", "system_prompt"} == asdict(PMCConfig()).keys()


@pytest.mark.parametrize("preset", ["llama-3.2-3b", "phi-1.5"])
def test_presets(files, monkeypatch, preset):
    assert config_of(files, monkeypatch, "--preset", preset) == asdict(PMCConfig.published(preset))


@pytest.mark.parametrize("command", ["finetune", "unlearn"])
def test_options_that_differ_in_name_or_value(files, monkeypatch, command):
    found = config_of(files, monkeypatch, "--prompt", "plain", "--system", "Be brief.", command=command)
    assert (found["prompt_style"], found["system_prompt"]) == ("plain", "Be brief.")
    if command == "unlearn":
        assert config_of(files, monkeypatch, "--top-k", "0")["top_k"] is None
        names = {"lambda": "retain_weight", "min-len": "min_words", "lr": "learning_rate"}
        assert all(config_of(files, monkeypatch, f"--{name}", "3")[field] == 3 for name, field in names.items())


def test_finetune_has_defaults_of_its_own(files, monkeypatch):
    """METHOD: 5 epochs; the rest of the loop as when unlearning."""
    want = asdict(PMCConfig(epochs=5, batch_size=16, accumulation=1))
    assert config_of(files, monkeypatch, command="finetune") == want
    loop = ("epochs", "batch_size", "accumulation", "learning_rate", "weight_decay", "warmup_epochs", "seed")
    words = [word for name in loop for word in ("--" + name.replace("_", "-"), str(OPTIONS[name]))]
    found = config_of(files, monkeypatch, *words, command="finetune")
    assert found == {**want, **{name: OPTIONS[name] for name in loop}}


@pytest.mark.parametrize("command", ["finetune", "unlearn"])
def test_the_configuration_reaches_the_training(files, monkeypatch, command):
    seen = []

    def stop(pmc, rows, config, **options):
        seen.extend([pmc.config, config])
        raise UserError("seen")

    monkeypatch.setattr(f"pmc_fast.training.{command}", stop)
    make_model().save_pretrained(files / "model")
    make_tokenizer().save_pretrained(files / "model")
    given, words = {"epochs": 2, "batch_size": 2, "weight_decay": 0.2}, ["--evaluation-tokens", "4", "--device", "cpu"]
    words += [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    want = PMCConfig(accumulation=1, **given)
    if command == "unlearn":
        words += "--preset phi-1.5 --num-samples 3 --max-new-tokens 5".split()
        want = PMCConfig.published("phi-1.5", num_samples=3, max_new_tokens=5, **given)
    assert cli.main([command, "--model", str(files / "model"), *inputs(files, command), *words]) == 2
    assert seen == [want, want]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("command", ["finetune", "unlearn"])
def test_the_report_says_what_was_in_force(files, monkeypatch, command, chat):
    """By default and by option; null where something has no effect."""
    held = []
    monkeypatch.setattr(f"pmc_fast.training.{command}", lambda pmc, *_, **__: held.append(pmc.config) or {})
    make_model().save_pretrained(files / "model")
    make_tokenizer(chat).save_pretrained(files / "model")
    method = {
        "finetune": [],
        "unlearn": ["--preset", "phi-1.5", "--num-samples", "3", "--max-length", "90", "--selection", "bradley_terry"],
    }[command]
    words = ["--lr", "2e-3", "--evaluation-tokens", "4", "--device", "cpu", *method]
    words += ["--prompt", "chat", "--system", ""] if chat else []
    assert cli.main([command, "--model", str(files / "model"), *inputs(files, command), *words]) == 0
    found, (config,) = json.loads((files / "out" / "report.json").read_text())["config"], held
    assert found["evaluation_rows"] == 400 and found["dtype"] == "float32" and found["learning_rate"] == 2e-3
    assert (found["prompt"], found["system"]) == (("chat", "") if chat else ("tags", None))
    options = json.loads((files / "out" / "config.json").read_text())["options"]
    assert found.keys() == options.keys() and options["epochs"] is None
    without_effect = {"max_new_tokens", "prune"}
    for name in found.keys() & asdict(config).keys():
        assert found[name] == (None if name in without_effect else getattr(config, name)), name
    assert {name for name, value in found.items() if value is None} <= without_effect | {"system", "paraphrased"}


def test_max_new_tokens_and_the_best_leave_max_length_and_tau_without_effect():
    pmc = SimpleNamespace(config=PMCConfig(max_new_tokens=5, tau=0.4), prompts=SimpleNamespace(style="plain"))
    options = dict.fromkeys(("max_length", "max_new_tokens", "tau", "prune", "prompt", "system"))
    found = commands._in_force(options, pmc)
    assert [*found.values()] == [None, 5, None, True, "plain", None]


@pytest.mark.parametrize("command", ["finetune", "unlearn", "evaluate"])
def test_what_a_model_is_loaded_with(files, monkeypatch, command):
    def load(*given):
        raise UserError(repr(given))

    monkeypatch.setattr(commands, "load_model", load)
    for more, expected in (
        ([], ("m", "auto", "float32", False)),
        (["--device", "cpu", "--dtype", "bfloat16", "--trust-remote-code"], ("m", "cpu", "bfloat16", True)),
    ):
        options = cli.make_parser().parse_args([command, "--model", "m", *inputs(files, command), *more])
        with pytest.raises(UserError) as stopped:
            getattr(commands, command)(options)
        assert str(stopped.value) == repr(expected)
