"""The training loops as METHOD has them: what a step sees, how the gradients of its micro-batches add up, what moves the weights."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pmc_fast import PMCConfig, inputs
from pmc_fast.data import QA
from pmc_fast.errors import UserError, not_finite, scores_not_finite
from pmc_fast.training import finetune, merge_stats, unlearn

QUESTIONS = [f"question {number}" for number in range(9)]
RETAIN = [QA(f"kept {number}", "answer") for number in range(40)]
DIRECTIONS = np.random.default_rng(7).normal(size=(len(QUESTIONS), 3))  # of each question's gradient


class Recorder:
    """A PMC whose loss has a gradient known from the questions alone, and which remembers what it was asked."""

    def __init__(self):
        self.lm = SimpleNamespace(model=nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            self.lm.model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
        self.ledger, self.prompts = SimpleNamespace(questions=QUESTIONS), SimpleNamespace(is_text=inputs.is_text)
        self.prepared, self.batches, self.retained, self.modes = [], [], [], []
        self.stats = {"seconds": {}, "score": 0.0, "collapse_loss": 0.0, "retain_loss": 0.0}
        self.fails = {}  # by the number of the call

    def prepare(self, batches):
        self.prepared.append(batches)

    def loss(self, indices, retain):
        self.batches.append(indices)
        self.retained.append([row.question for row in retain])
        self.modes.append(self.lm.model.training)
        if len(self.batches) in self.fails:
            raise self.fails[len(self.batches)]
        return (self.lm.model.weight[0] * torch.tensor(gradient(indices), dtype=torch.float32)).sum()

    def supervised_loss(self, rows):
        return self.loss([QUESTIONS.index(row.question) for row in rows], [])


def gradient(indices):
    return DIRECTIONS[indices].sum(0)


def make_config(seed, **changes):
    given = {"epochs": 3, "batch_size": 2, "accumulation": 2, "learning_rate": 0.1, "weight_decay": 0.3, "seed": seed}
    return PMCConfig(**{**given, **changes})


def test_every_epoch_asks_every_question_in_an_order_of_its_own(rng_seed):
    pmc = Recorder()
    unlearn(pmc, RETAIN, make_config(rng_seed), progress=False)
    assert [len(batch) for batch in pmc.batches] == 3 * [2, 2, 2, 2, 1]
    epochs = [sum(pmc.batches[5 * epoch : 5 * epoch + 5], []) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(9))]
    assert epochs[0] != epochs[1] != epochs[2]  # by chance once in 362880


def test_every_micro_batch_keeps_as_many_other_retain_rows(rng_seed):
    pmc = Recorder()
    unlearn(pmc, RETAIN, make_config(rng_seed, batch_size=4), progress=False)
    assert [len(set(rows)) for rows in pmc.retained] == len(pmc.batches) * [4]
    assert len({tuple(rows) for rows in pmc.retained}) == len(pmc.retained)  # of 91390 sets
    few = Recorder()
    unlearn(few, RETAIN[:2], make_config(rng_seed, batch_size=4), progress=False)
    assert {len(rows) for rows in few.retained} == {4}


def test_a_step_samples_for_all_its_micro_batches_at_once(rng_seed):
    pmc = Recorder()
    unlearn(pmc, RETAIN, make_config(rng_seed), progress=False)
    assert [len(batches) for batches in pmc.prepared] == 3 * [2, 2, 1]
    assert sum(pmc.prepared, []) == pmc.batches


def train(pmc, what, config, **options):
    if what == "unlearn":
        unlearn(pmc, RETAIN, config, progress=False, **options)
    else:
        finetune(pmc, [QA(question, "answer") for question in QUESTIONS], config, progress=False, **options)


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
def test_logits_that_training_ruined_name_the_step_and_what_to_try(what, rng_seed):
    """At the first step nothing was trained yet; other errors keep their own words."""
    advice = "; try a lower learning rate"
    for error in (not_finite("collapse_loss", 3), scores_not_finite(2), ValueError("score: got nan")):
        for step in (1, 2):
            pmc = Recorder()
            pmc.fails = {2 * step - 1: error}  # two micro-batches each
            with pytest.raises(UserError) as raised:
                train(pmc, what, make_config(rng_seed))
            is_theirs = step > 1 and "score: got" not in str(error)
            assert str(raised.value) == f"step {step}: {error}{advice * is_theirs}"


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_model_trains_in_training_mode_and_gets_its_own_back(mode, what, rng_seed):
    pmc = Recorder()
    pmc.lm.model.train(mode)
    train(pmc, what, make_config(rng_seed))
    assert all(pmc.modes) and pmc.lm.model.training == mode


@pytest.mark.parametrize(("what", "longest"), [("unlearn", None), ("finetune", None), ("finetune", 0.4)])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 2.0])
def test_weights_move_by_adamw_after_a_warm_up_and_a_decay(what, longest, warmup_epochs, rng_seed):
    """Gradients of a step are summed when unlearning, as published; averaged when fine-tuning, and then cut to a longest norm."""
    pmc, config = Recorder(), make_config(rng_seed, warmup_epochs=warmup_epochs)
    train(pmc, what, config, **({"max_grad_norm": longest} if longest else {}))
    weight, first, second = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    windows = [pmc.batches[begin : begin + 2] for epoch in range(3) for begin in (5 * epoch, 5 * epoch + 2)]
    windows = [w for e in range(3) for w in (*windows[2 * e : 2 * e + 2], pmc.batches[5 * e + 4 : 5 * e + 5])]
    steps, warm = len(windows), round(3 * warmup_epochs)
    for step, window in enumerate(windows, 1):
        total = sum(gradient(batch) for batch in window) / (1 if what == "unlearn" else len(window))
        total = total * min(1, (longest or math.inf) / np.linalg.norm(total))
        rate = 0.1 * (step / warm if step <= warm else (steps - step + 1) / (steps - warm))
        first, second = 0.9 * first + 0.1 * total, 0.999 * second + 0.001 * total**2
        moved = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight = weight * (1 - rate * 0.3) - rate * moved
    assert math.isclose(rate, 0.1 / (steps - warm))  # the last step's, on its way to 0
    np.testing.assert_allclose(pmc.lm.model.weight[0].detach().numpy(), weight, rtol=1e-4, atol=1e-5)


def test_counts_of_micro_batches_are_added_and_the_rest_averaged():
    micro_batches = [{"seconds": {"train": 1.0}, "score": 0.5, "sampled_tokens": 3}]
    micro_batches.append({"seconds": {"train": 2.0}, "score": 0.25, "sampled_tokens": 4})
    assert merge_stats(micro_batches) == {"score": 0.375, "sampled_tokens": 7}


@pytest.mark.parametrize(("every", "saved"), [(None, [3, 6, 9]), (2, [2, 4, 6, 8, 9])])
def test_what_is_logged_and_saved(every, saved, rng_seed):
    pmc, config, records, states = Recorder(), make_config(rng_seed), [], []
    run = SimpleNamespace(load_checkpoint=lambda: None, log=records.append, save_checkpoint=states.append)
    pmc.state_dict, pmc.stats = dict, {"seconds": {"sample": 2.0}, "score": 0.5, "collapse_loss": 1, "retain_loss": 0.0}
    seconds = unlearn(pmc, RETAIN, config, run=run, checkpoint_every=every, progress=False)
    assert [(record["step"], record["epoch"]) for record in records] == [(n, (n + 2) // 3) for n in range(1, 10)]
    rates = [0.1 * share for share in (1 / 3, 2 / 3, 1, *(left / 6 for left in range(6, 0, -1)))]
    assert [record["learning_rate"] for record in records] == pytest.approx(rates)
    assert [record["collapse_loss"] for record in records] == 3 * [2, 2, 1]  # by micro-batches
    assert [record["seconds"]["sample"] for record in records] == 3 * [4.0, 4.0, 2.0]
    assert [state["step"] for state in states] == saved
    assert states[-1]["seconds"]["sample"] == seconds["sample"] == 30.0
    assert seconds["train"] > 0 and states[-1]["seconds"].get("checkpoint", 0.0) < seconds["checkpoint"]


def test_the_loss_that_is_logged_is_the_mean_of_the_micro_batches(rng_seed):
    pmc, records = Recorder(), []
    values = iter([3.0, 5.0, 8.0])
    pmc.loss = lambda indices, retain: 0 * pmc.lm.model.weight.sum() + next(values)
    run = SimpleNamespace(load_checkpoint=lambda: None, log=records.append, save_checkpoint=lambda state: None)
    pmc.state_dict = dict
    unlearn(pmc, RETAIN, make_config(rng_seed, epochs=1, accumulation=3, batch_size=3), run=run, progress=False)
    assert [record["loss"] for record in records] == [16 / 3]


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_checkpoints_that_can_never_be_due_are_refused(what, every, rng_seed):
    pmc = Recorder()
    with pytest.raises(UserError, match=f"^checkpoint_every: got {every}, expected an integer of at least 1$"):
        train(pmc, what, make_config(rng_seed), checkpoint_every=every)
    assert pmc.batches == []


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training_before_it_moves_a_weight(what, value, rng_seed):
    pmc = Recorder()
    before, loss = pmc.lm.model.weight.clone(), pmc.loss
    pmc.loss = lambda *given: loss(*given) * value if len(pmc.batches) == 1 else loss(*given)
    with pytest.raises(UserError, match=f"^step 1: the loss is -?{value}; try a lower learning rate$"):
        train(pmc, what, make_config(rng_seed))
    assert torch.equal(pmc.lm.model.weight, before) and len(pmc.batches) == 2


def test_nothing_to_train_on_is_refused(rng_seed):
    pmc, config = Recorder(), make_config(rng_seed)
    for train_on, name in ((unlearn, "retain"), (finetune, "rows")):
        with pytest.raises(UserError, match=f"^{name}: got none, expected at least one$"):
            train_on(pmc, [], config, progress=False)
        with pytest.raises(UserError, match=f"^{name}: row 2: its answer is 3"):
            train_on(pmc, [*RETAIN[:2], {"question": "a", "answer": 3}], config, progress=False)
    assert not pmc.batches
    pmc.ledger = None
    with pytest.raises(UserError, match="^pmc: its ledger is empty; call pmc.initialise"):
        unlearn(pmc, RETAIN, config, progress=False)


@pytest.mark.parametrize("norm", [-1, 0, math.nan, math.inf, "1", True])
def test_a_gradients_norm_that_is_none_is_refused(norm, rng_seed):
    with pytest.raises(UserError, match=f"^max_grad_norm: got {norm!r}, expected a finite number above 0 or None$"):
        finetune(Recorder(), RETAIN, make_config(rng_seed), max_grad_norm=norm, progress=False)


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
def test_gradients_that_were_there_before_are_no_part_of_the_first_step(what, rng_seed):
    fresh, other = Recorder(), Recorder()
    other.lm.model.weight.grad = torch.full((1, 3), 9.0)
    for pmc in (fresh, other):
        train(pmc, what, make_config(rng_seed))
    assert torch.equal(fresh.lm.model.weight, other.lm.model.weight)


@pytest.mark.parametrize("what", ["unlearn", "finetune"])
def test_a_model_that_is_frozen_is_refused(what, rng_seed):
    pmc = Recorder()
    pmc.lm.model.requires_grad_(False)
    with pytest.raises(UserError, match="^model: no parameter requires a gradient, expected at least one to train$"):
        train(pmc, what, make_config(rng_seed))
    assert not pmc.batches


@pytest.mark.parametrize("what", [unlearn, finetune])
def test_other_objects_are_refused(what, rng_seed):
    config = make_config(rng_seed)
    for pmc in (Recorder().lm.model, None, Recorder):
        with pytest.raises(UserError, match="^pmc: got .*, expected a PMC: pmc_fast.PMC"):
            what(pmc, RETAIN, config, progress=False)
    for wrong in (None, {"epochs": 3}):
        with pytest.raises(UserError, match="^config: got .*, expected a PMCConfig, such as pmc.config$"):
            what(Recorder(), RETAIN, wrong, progress=False)
    with pytest.raises(UserError, match="^run: got 'out', expected a Run: "):
        what(Recorder(), RETAIN, config, run="out", progress=False)
