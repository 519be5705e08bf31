"""PMCTrainer: a Trainer whose loss is PMC's, with all that Trainers do around it."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tiny import make_model, make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainingArguments

from pmc_fast import PMC, UserError
from pmc_fast.data import QA
from pmc_fast.integrations import columns

pytest.importorskip("accelerate")
from trainers import CHECKPOINTING, CONFIG, FORGET, RETAIN, Length, arguments, make_trainer, weights  # noqa: E402


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_step_is_the_mean_gradient_of_its_micro_batches(tmp_path, rng_seed):
    """Against PMC by hand, one micro-batch at a time, with the rows that the trainer took."""
    model = make_model(seed=rng_seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, schedule), num_train_epochs=1, max_grad_norm=0.0)
    taken, calls = [], []
    loss, sample = trainer.pmc.loss, trainer.pmc.sampler.sample

    def spied_loss(forget, retain):
        assert len(retain) == len(forget) and all(isinstance(row, QA) for row in retain)
        taken.append((forget, retain))
        return loss(forget, retain)

    trainer.pmc.loss = spied_loss
    trainer.pmc.sampler.sample = lambda *args, **kwargs: calls.append(len(args[0])) or sample(*args, **kwargs)
    trainer.train()
    assert sorted(index for forget, _ in taken for index in forget) == [0, 1, 2, 3, 4]
    assert [len(forget) for forget, _ in taken] == [2, 2, 1]
    assert calls == [5, 4, 1]  # the first answers, then one call per optimizer step

    by_hand = make_model(seed=rng_seed).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    pmc = PMC(by_hand, make_tokenizer(), CONFIG, Length())
    pmc.initialise([row["question"] for row in FORGET])
    for step in (taken[:2], taken[2:]):
        for forget, retain in step:
            (pmc.loss(forget, retain) / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.pmc.state_dict() == pmc.state_dict()
    for name, weight in weights(by_hand).items():
        torch.testing.assert_close(weights(model)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_warnings_name_the_line_that_trains(tmp_path, rng_seed):
    """Not one of transformers, which calls PMC."""
    trainer = make_trainer(tmp_path, seed=rng_seed, pmc_config=replace(CONFIG, max_new_tokens=130), max_steps=1)
    with pytest.warns(UserWarning, match="more than 128 tokens together") as warned:
        trainer.train()
    assert {one.filename for one in warned if "more than 128 tokens" in str(one.message)} == {__file__}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_runs_end_like_whole_ones(step, tmp_path, rng_seed):
    """With dropout, in the middle of an epoch and at its end."""
    make = {"seed": rng_seed, "attention_dropout": 0.2}
    options = {"save_strategy": "steps", "save_steps": 1, "seed": 3}
    whole = make_trainer(tmp_path / "run", make_model(**make), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "run", make_model(**make), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 4
    assert_same(weights(whole.model), weights(resumed.model))
    assert whole.pmc.state_dict() == resumed.pmc.state_dict()
    logged = [[entry.get(name) for name in ("step", "loss", "score")] for entry in whole.state.log_history]
    assert logged == [[entry.get(name) for name in ("step", "loss", "score")] for entry in resumed.state.log_history]
    held = json.loads((tmp_path / "run" / "checkpoint-4" / "pmc.json").read_text())
    assert held == json.loads(json.dumps(whole.pmc.state_dict()))


def test_resume_takes_the_last_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, **options).train()
    resumed = make_trainer(tmp_path, **{**options, "max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3]


def test_a_ledger_that_does_not_fit_or_is_missing_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = make_trainer(tmp_path, max_steps=2, forget_dataset=FORGET[:4])
    with pytest.raises(UserError, match="other forget questions"):
        other.train(resume_from_checkpoint=True)
    held = tmp_path / "checkpoint-1" / "pmc.json"
    for damage, reason in (
        ("[1]", "state: got a value of type list"),
        ('{"ledger": {}, "prepared": []}', "state: ledger: got a dict of nothing"),
        ('{"ledger": null, "prepared": []}', "other forget questions"),
    ):
        held.write_text(damage)
        trainer = make_trainer(tmp_path, max_steps=2)
        with pytest.raises(UserError, match=rf"^resume_from_checkpoint: .*pmc.json.* {reason}"):
            trainer.train(resume_from_checkpoint=True)
        assert trainer.pmc.ledger is None
    held.unlink()
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*pmc.json cannot be read"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_the_answers_before_forgetting_are_in_no_folder_to_publish(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not list(tmp_path.rglob("pmc.json"))
    assert (tmp_path / "model" / "model.safetensors").exists() and (tmp_path / "model" / "tokenizer.json").exists()


def test_logs(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, callbacks=[Watch()], logging_steps=2)
    stats = []
    loss = trainer.pmc.loss
    trainer.pmc.loss = lambda *args: (loss(*args), stats.append(trainer.pmc.stats))[0]
    trainer.train()
    entries = [entry for entry in seen if "loss" in entry]
    assert len(entries) == 2 and len(stats) == 6
    for entry, part in zip(entries, (stats[:3], stats[3:]), strict=True):
        for name in ("collapse_loss", "retain_loss", "score"):
            assert entry[name] == pytest.approx(sum(one[name] for one in part) / 3)
        for name in (
            "sampled_tokens",
            "decoded_tokens",
            "trained_tokens",
            "pruned_samples",
            "empty_picks",
            "truncated_picks",
        ):
            assert entry[name] == sum(one[name] for one in part)
        assert entry["trained_tokens"] > 0 and entry["sample_seconds"] >= 0 and entry["score_seconds"] >= 0
    assert entries[0]["sampled_tokens"] > 0
    assert "collapse_loss" not in seen[-1]  # the summary


def test_bf16_checkpointing_and_adapters(tmp_path, rng_seed):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(make_model("gemma2", seed=rng_seed), lora)

    options = {
        "bf16": True,
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(tmp_path, adapted(), **options)
    before, dtypes = weights(trainer.model), []
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype) if module.training else None)
    trainer.train()
    after = weights(trainer.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {n for n in after if "lora" in n}
    assert set(dtypes) == {torch.bfloat16}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)
    assert len(dtypes) == 2 * 6  # each micro-batch's forward pass, and again in its backward pass

    resumed = make_trainer(tmp_path, adapted(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(after, weights(resumed.model))


@torch.no_grad()
def test_evaluation_is_the_mean_nll_of_answers(tmp_path, rng_seed):
    trainer = make_trainer(tmp_path, seed=rng_seed, eval_dataset={"kept": RETAIN}, per_device_eval_batch_size=6)
    prompts, total, count = trainer.pmc.prompts, 0.0, 0
    for row in RETAIN:
        prompt, answer = prompts.prompt_ids(row["question"]), prompts.answer_ids(row["answer"])
        logits = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total, count = total + cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), count + len(answer)
    assert trainer.evaluate()["eval_kept_loss"] == pytest.approx(total / count, rel=1e-4)
    first = prompts.answer_ids(RETAIN[0]["answer"])
    assert trainer.evaluate(RETAIN[:1])["eval_loss"] > 0 and len(first) > 1
    predicted = trainer.predict(RETAIN)
    assert predicted.metrics["test_loss"] == pytest.approx(total / count, rel=1e-4) and predicted.predictions is None
    with pytest.raises(UserError, match='^test_dataset: row 0: has no "answer"'):
        trainer.predict(FORGET)
    assert trainer.pmc.ledger is None


def test_evaluation_within_training_and_the_best_model(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=RETAIN,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 5 and len(set(evaluated)) == 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_true_answers_to_forget_questions_are_not_read(tmp_path):
    class Row(dict):
        def __getitem__(self, key):
            assert key != "answer"
            return super().__getitem__(key)

    trainer = make_trainer(tmp_path, forget_dataset=[Row(row, answer="secret") for row in FORGET], max_steps=1)
    trainer.train()
    assert "secret" not in json.dumps(trainer.pmc.state_dict())


def test_training_again_keeps_the_ledger(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    ledger = trainer.pmc.ledger
    trainer.train()
    assert trainer.pmc.ledger is ledger and sum(ledger.visits) == 8


class Slotted(NamedTuple):
    question: str
    answer: str


def test_rows_may_have_attributes_of_any_kind():
    row = Slotted("Who?", "Ada")
    assert columns.questions("rows", [row]) == ["Who?"] and columns.rows("rows", [row]) == [QA("Who?", "Ada")]


class Columns(list):
    """What the library asks of a datasets.Dataset."""

    column_names = ["prompt", "answer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_dataset": [{"prompt": "x"}]}, 'forget_dataset: row 0: has no "question", only "prompt"; rename'),
        ({"forget_dataset": Columns()}, r'forget_dataset: has no "question", only "prompt", "answer".*rename_column'),
        ({"forget_dataset": []}, "forget_dataset: got no rows"),
        ({"forget_dataset": "file.jsonl"}, "forget_dataset: got 'file.jsonl', expected a dataset"),
        ({"forget_dataset": [{"question": " "}]}, "forget_dataset: row 0: \"question\" is ' ', expected a text"),
        ({"retain_dataset": FORGET}, 'retain_dataset: row 0: has no "answer", only "question"'),
        ({"retain_dataset": [{"question": "a", "answer": 3}]}, 'retain_dataset: row 0: "answer" is 3'),
        ({"eval_dataset": FORGET}, 'eval_dataset: row 0: has no "answer"'),
        ({"eval_dataset": {"one": FORGET}}, r"eval_dataset\['one'\]: row 0: has no"),
        ({"model": torch.nn.Linear(3, 3)}, "model: got Linear"),
        ({"args": "out"}, "args: got 'out', expected TrainingArguments or None"),
        ({"label_smoothing_factor": 0.1}, "args.label_smoothing_factor: got 0.1, expected 0"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "args.hub_strategy: got 'all_checkpoints'"),
    ],
)
def test_bad_input(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_gpu": 3}, r"args: got 3 GPUs in one process, .*nn.DataParallel, .*torchrun --nproc-per-node=3"),
        ({"fsdp": True}, r"args.fsdp: got True, expected none: .*docs/distributed.md"),
        ({"deepspeed": {"zero": 3}}, r"args.deepspeed: got {'zero': 3}, expected none: .*docs/distributed.md"),
        ({"parallelism_config": "x"}, r"args.parallelism_config: got 'x', expected none"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"args.fsdp: got true through ACCELERATE_USE_FSDP, expected none"),
        (
            {"WORLD_SIZE": "2"},
            "args.use_cpu: got True in one of 2 processes that have no GPU, .* expected True",
        ),
        ({"world_size": 2, "torch_compile": True}, r"args.torch_compile: got True, expected False with several"),
        ({"world_size": 2, "even_batches": False}, r"args.accelerator_config: got even_batches=False or"),
        ({"world_size": 2, "dispatch_batches": True}, r"args.accelerator_config: got .* dispatch_batches=True"),
    ],
)
def test_what_several_processes_or_gpus_cannot_do(change, message, tmp_path, monkeypatch):
    args = arguments(tmp_path / "run")
    assert args.world_size == 1  # looked at now, before the environment changes
    for name, value in change.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
        elif hasattr(args.accelerator_config, name):
            setattr(args.accelerator_config, name, value)
        elif isinstance(getattr(TrainingArguments, name, None), property):
            monkeypatch.setattr(TrainingArguments, name, value)
        else:
            setattr(args, name, value)
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path / "run", args=args)
    assert not (tmp_path / "run").exists()


def test_without_arguments_several_gpus_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="args: got 2 GPUs in one process"):
        make_trainer(tmp_path, args=None)


def test_datasets_with_columns_and_torch_datasets_are_read():
    from pmc_fast.integrations import columns

    class Selected(list):
        column_names = ["question", "answer", "large"]

        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    table = Selected({"question": f"q{i}", "answer": "a", "large": 1} for i in range(3))
    assert columns.questions("x", table) == ["q0", "q1", "q2"]

    class Endless:  # as torch's datasets may be: a length, and no end of indices
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return QA(f"q{index}", "a")

    assert columns.rows("x", Endless()) == [QA("q0", "a"), QA("q1", "a")]
    assert columns.rows("x", iter([QA("q", "a")])) == [QA("q", "a")]
