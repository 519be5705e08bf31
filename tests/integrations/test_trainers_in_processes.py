"""PMCTrainer and open-unlearning's PMC in two and three gloo processes, against one process with as many micro-batches."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from collectives import on_ranks
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from pmc_fast import PMC, PMCConfig, UserError, parallel

pytest.importorskip("accelerate")
from trainers import (  # noqa: E402
    CHECKPOINTING,
    FinetuneTrainer,
    ForgetRetain,
    Length,
    load_trainer,
    make_row,
    make_trainer,
    weights,
)

from pmc_fast.integrations.open_unlearning import pmc_trainer  # noqa: E402
from pmc_fast.parallel.data import from_all_ranks  # noqa: E402

# In batches of 2 over two or three processes, something is left for one rank alone, and half a batch of it.
FORGET = [{"question": f"Who is {name}?"} for name in ("Ada", "Bo", "Cyril", "Di", "Ed", "Flo", "Gus", "Hal", "Ida")]
EVALUATED = [{"question": f"What is {c}?", "answer": c} for c in "abcdefghi"]
# Initial answers as long as their batch leaves room for.
CONFIG = PMCConfig(num_samples=3, max_new_tokens=None, max_length=40, batch_size=2, seed=5)
ROUNDS = 2  # micro-batches of a rank in an optimizer step


def options(micro_batches, **changes):
    return {
        "forget_dataset": FORGET,
        "pmc_config": CONFIG,
        "gradient_accumulation_steps": micro_batches,
        "num_train_epochs": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_dataset": EVALUATED,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 2,
        **changes,
    }


def dataset():
    forget = [make_row([10 + i, 11], [12, 13, i]) for i in range(9)]
    return ForgetRetain(forget, [make_row([i, 7], [8, 9, i]) for i in range(4)])


def load_theirs(folder, micro_batches, seed, data=None, **method):
    names = ("gradient_accumulation_steps", "num_train_epochs", "learning_rate", "optim")
    training = {name: options(micro_batches)[name] for name in names}
    training |= {"logging_steps": 4, "save_strategy": "no"}  # the last steps are not logged; saving would merge ledgers
    registry = {"PMC": pmc_trainer(FinetuneTrainer)}
    return load_trainer(folder, registry, data or dataset(), make_model(seed=seed), training=training, **method)


def outcome(trainer):
    return {"weights": weights(trainer.model), "ledger": trainer.pmc.state_dict(), "logs": trainer.state.log_history}


def assert_alike(got, want):
    """Weights and what was logged but for floating point, the ledger; not what depends on micro-batches per process."""
    for name, weight in want["weights"].items():
        torch.testing.assert_close(
            got["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert got["ledger"] == want["ledger"]
    assert len(got["logs"]) == len(want["logs"])
    for mine, other in zip(got["logs"], want["logs"], strict=True):
        timed = {name for name in other if name.endswith(("seconds", "second", "runtime", "time"))}
        assert mine.keys() - timed == other.keys() - timed
        for name in other.keys() - timed - {"epoch", "total_flos", "train_loss"}:
            expected = other[name] if isinstance(other[name], int) else pytest.approx(other[name], rel=1e-3)
            assert mine[name] == expected, name


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one_process(ranks, rng_seed, tmp_path):
    alone = make_trainer(tmp_path / "alone", seed=rng_seed, **options(ranks * ROUNDS))
    alone.train()
    theirs = load_theirs(tmp_path / "theirs alone", ranks * ROUNDS, rng_seed)
    theirs.train()
    want = outcome(alone)
    start = weights(make_model(seed=rng_seed))
    assert sum(float((value - start[name]).abs().sum()) for name, value in want["weights"].items()) > 0.1
    torch.save({"ours": want, "theirs": outcome(theirs)}, tmp_path / "want.pt")
    checks = [_training, _resuming, _theirs, _repeated_questions, _initial_answers]
    if ranks == 2:  # no matter how many there are
        checks += [_training_again, _errors]
    on_ranks(ranks, checks, rng_seed, tmp_path / "store", tmp_path)

    saved = load_file(tmp_path / "ranks" / "final" / "model.safetensors")
    for name, value in saved.items():
        torch.testing.assert_close(value, want["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    for step in range(1, alone.state.global_step + 1):
        files = [tmp_path / run / f"checkpoint-{step}" / "pmc.json" for run in ("alone", "ranks")]
        assert json.loads(files[0].read_text()) == json.loads(files[1].read_text()), step
    resumed = make_trainer(tmp_path / "again", seed=rng_seed, **options(ranks * ROUNDS))
    resumed.train(resume_from_checkpoint=str(tmp_path / "ranks" / "checkpoint-1"))
    assert_alike(outcome(resumed), want)


def of_one_process(folder):
    return torch.load(folder / "want.pt", weights_only=False)


class Watch(TrainerCallback):
    """Counts the gradients' reductions, once training has begun."""

    def __init__(self):
        self.reductions = 0

    def on_train_begin(self, args, state, control, **kwargs):
        def reduce(_, bucket):
            self.reductions += 1
            return allreduce_hook(None, bucket)

        assert kwargs["model"] is self.trainer.model
        self.trainer.model_wrapped.register_comm_hook(None, reduce)


def _training(rank, ranks, seed, folder):
    """The whole run: each question once in an epoch, one sampling call and one reduction of gradients in a step."""
    want, watch, calls, met = of_one_process(folder)["ours"], Watch(), [], []
    # DDP hands rank 0's model to the others.
    trainer = make_trainer(folder / "ranks", seed=seed + rank, callbacks=[watch], **options(ROUNDS))
    watch.trainer, model = trainer, trainer.model
    sample, loss, state_dict = trainer.pmc.sampler.sample, trainer.pmc.loss, trainer.pmc.state_dict
    trainer.pmc.sampler.sample = lambda *args, **kwargs: calls.append(len(args[0])) or sample(*args, **kwargs)
    trainer.pmc.loss = lambda forget, retain: met.extend(forget) or loss(forget, retain)
    if rank:
        trainer.pmc.state_dict = None  # only the main process writes it
    trainer.train()
    trainer.pmc.state_dict = state_dict
    assert_alike(outcome(trainer), want)
    assert trainer.model is model and trainer.accelerator.unwrap_model(model) is model
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert watch.reductions == trainer.state.global_step  # the tiny model is one bucket
    everyones = [question for part in from_all_ranks(met) for question in part]
    assert sorted(everyones) == sorted(3 * list(range(len(FORGET))))
    first = -(-len(FORGET) // CONFIG.batch_size)  # batches of initial answers
    first = len(range(rank, first, ranks))
    assert all(size == CONFIG.batch_size for size in calls[: first - 1]) and sum(calls[first:]) == len(met)
    assert len(calls) - first <= trainer.state.global_step
    trainer.save_model(str(folder / "ranks" / "final"))
    *_, evaluated, summary = want["logs"]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-3)


def _resuming(rank, ranks, seed, folder):
    """From a checkpoint of one process and from one of as many, both within an epoch if it has two steps."""
    for run in ("alone", "ranks"):
        trainer = make_trainer(folder / "resumed", seed=seed, **options(ROUNDS, save_strategy="no"))
        trainer.train(resume_from_checkpoint=str(folder / run / "checkpoint-1"))
        assert_alike(outcome(trainer), of_one_process(folder)["ours"])
    # With other steps: as many more as Trainer makes it, and ranks still agree.
    trainer = make_trainer(folder / "resumed", seed=seed, **options(1, save_strategy="no"))
    trainer.train(resume_from_checkpoint=str(folder / "ranks" / "checkpoint-1"))
    assert trainer.state.global_step == 3 * -(-len(FORGET) // (2 * ranks))
    got = outcome(trainer)
    for other in from_all_ranks(got):
        assert other["ledger"] == got["ledger"] and all(
            map(torch.equal, other["weights"].values(), got["weights"].values())
        )


def _training_again(rank, ranks, seed, folder):
    """After an evaluation and an earlier training; with adapters, bfloat16 and activations computed again."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(make_model("gemma2", seed=seed), lora)
    changes = {"bf16": True, CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    changes |= {"save_strategy": "no", "eval_strategy": "no", "num_train_epochs": 1}
    trainer = make_trainer(folder / "adapted", adapted, **options(1, **changes))
    steps = -(-len(FORGET) // (2 * ranks))
    losses = [trainer.evaluate()["eval_loss"]]
    for epochs in (1, 2):
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        assert {n for n in after if not torch.equal(after[n], before[n])} == {n for n in after if "lora" in n}
        assert trainer.state.global_step == steps
        assert trainer.pmc.ledger.visits == [epochs] * len(FORGET)
        for theirs in from_all_ranks(after):
            assert all(torch.equal(after[name], theirs[name]) for name in after)
        losses.append(trainer.evaluate()["eval_loss"])
    assert all(one != other for one, other in pairwise(losses))


def _theirs(rank, ranks, seed, folder):
    """open-unlearning's trainer, with retain rows that its dataset pairs with the questions."""
    want, trainer = of_one_process(folder)["theirs"], load_theirs(folder / "theirs", ROUNDS, seed)
    trainer.train()
    assert_alike(outcome(trainer), want)
    summary = want["logs"][-1]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-3)
    assert trainer.evaluate() == {"own": "theirs"}


class Drawn(ForgetRetain):
    """Draws retain rows as its ForgetRetainDataset does."""

    def __getitem__(self, index):
        return {"forget": self.forget[index], "retain": self.retain[torch.randint(0, len(self.retain), (1,)).item()]}


def _repeated_questions(rank, ranks, seed, folder):
    """Where an epoch meets questions twice, no rank draws again what another has drawn before; and retain rows differ."""
    forget = [make_row([10 + i % 5, 11], [12, 13, i]) for i in range(9)]
    data = Drawn(forget, [make_row([i, 7], [8, 9, i]) for i in range(200)])
    runs = []
    for _ in range(2):
        trainer = load_theirs(folder / "repeated", 1, seed, data, reward=Length())
        drawn, kept = [], []
        prepare, retain_rows = trainer.pmc.prepare, trainer.retain_rows

        def spied_prepare(batches, drawn=drawn, trainer=trainer, prepare=prepare):
            for question in {question for batch in batches for question in batch}:
                drawn.append((question, trainer.pmc.ledger.visits[question], trainer.state.global_step))
            prepare(batches)

        def spied_rows(*args, kept=kept, retain_rows=retain_rows):
            rows = retain_rows(*args)
            kept.extend(tuple(row.question) for row in rows)
            return rows

        trainer.pmc.prepare, trainer.retain_rows = spied_prepare, spied_rows
        trainer.train()
        steps = {}
        for question, visit, step in (one for part in from_all_ranks(drawn) for one in part):
            steps.setdefault((question, visit), set()).add(step)
        assert len(steps) > 9 and all(len(of) == 1 for of in steps.values())
        assert len({tuple(rows[:2]) for rows in from_all_ranks(kept)}) == ranks
        runs.append((drawn, kept))
    assert runs[0] == runs[1]


def _initial_answers(rank, ranks, seed, folder):
    """Shared out over the ranks they are those of one process, also if there are fewer than ranks."""
    for questions in ([row["question"] for row in FORGET], ["Who is Ada?"]):
        ours, single = (PMC(make_model(seed=seed), make_tokenizer(), CONFIG) for _ in range(2))
        parallel.initialise(ours, questions)
        single.initialise(questions)
        assert ours.ledger.state_dict() == single.ledger.state_dict()
    with pytest.raises(UserError, match="forget_questions: rank . got others than rank"):
        parallel.initialise(ours, ["Who is Ada?", f"Who is {rank}?"])
    with pytest.raises(UserError, match="forget_questions: got none"):
        parallel.initialise(ours, [])
    with pytest.raises(UserError, match="forget_questions: got 'Who is Ada\\?', expected a list of texts"):
        parallel.initialise(ours, ["Who is Ada?"] if rank else "Who is Ada?")  # no rank is left waiting
    ours.config = replace(CONFIG, max_new_tokens=None, max_length=20, batch_size=1)
    with pytest.raises(UserError, match="max_length: got 20, which leaves no room"):  # for the longer one, on its rank
        parallel.initialise(ours, ["Who?", "Who is the poet of the north?"])


def _errors(rank, ranks, seed, folder):
    trainer = make_trainer(folder / "errors", seed=seed, **options(1, save_strategy="no"))
    if rank:
        trainer.pmc.initialise([row["question"] for row in FORGET])
    with pytest.raises(UserError, match="the ledger is empty on some rank"):
        trainer.train()
    with pytest.raises(UserError, match="other forget questions"):
        make_trainer(folder / "errors", **options(1, forget_dataset=FORGET[:4])).train(
            str(folder / "ranks" / "checkpoint-1")
        )
