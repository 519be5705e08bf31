"""open-unlearning: its losses from fused_batch_nll, and PMC in its registry, with stand-ins for its data."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_model
from torch.nn.functional import cross_entropy, logsigmoid

from pmc_fast import PMCConfig, UserError
from pmc_fast.models import LanguageModel

pytest.importorskip("accelerate")
from trainers import END, PAD, FinetuneTrainer, ForgetRetain, collate, load_trainer, make_dataset, make_row  # noqa: E402

from pmc_fast.integrations import open_unlearning  # noqa: E402
from pmc_fast.integrations.open_unlearning import fused_batch_nll, pmc_trainer  # noqa: E402


def batch_nll(model, inputs):
    """What fused_batch_nll stands in for."""
    outputs = model(**inputs)
    nll = cross_entropy(outputs.logits[:, :-1].mT, inputs["labels"][:, 1:], ignore_index=-100, reduction="none")
    return nll.sum(1), outputs


def preference(nll, model, reference, win, lose, beta):
    """Its DPO; its NPO where there is no `win`."""

    def ratio(inputs):
        with torch.no_grad():
            before, _ = nll(reference, inputs)
        return before - nll(model, inputs)[0]

    margin = (ratio(win) if win is not None else 0.0) - ratio(lose)
    return -2 / beta * logsigmoid(beta * margin).mean()


def simnpo(nll, model, inputs, beta, delta):
    mean = nll(model, inputs)[0] / (inputs["labels"] != -100).sum(-1)
    return -2 / beta * logsigmoid(beta * (mean - delta)).mean()


@pytest.mark.parametrize("side, pad", [("right", PAD), ("left", PAD), ("right", END)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_its_losses_and_gradients_stay_the_same(family, side, pad, rng_seed):
    model, reference = make_model(family, seed=rng_seed).train(), make_model(family, seed=rng_seed + 1)
    win, lose = (collate([make_row() for _ in range(3)], side, pad) for _ in range(2))
    losses = {
        "nll": lambda nll: nll(model, lose)[0].sum(),
        "NPO": lambda nll: preference(nll, model, reference, None, lose, 0.3),
        "DPO": lambda nll: preference(nll, model, reference, win, lose, 0.3),
        "SimNPO": lambda nll: simnpo(nll, model, lose, 1.7, 0.2),
    }
    for name, loss in losses.items():
        results = []
        for nll in (batch_nll, fused_batch_nll):
            model.zero_grad()
            value = loss(nll)
            value.backward()
            results.append((value.detach(), [p.grad.clone() for p in model.parameters()]))
        (want, want_gradients), (got, got_gradients) = results
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for gradient, exact in zip(got_gradients, want_gradients, strict=True):
            atol = 1e-4 * exact.abs().max().item() + 1e-6
            torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_head_makes_no_logits(rng_seed):
    model, inputs, calls = make_model(seed=rng_seed), collate([make_row() for _ in range(3)]), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    want, _ = batch_nll(model, inputs)
    got, outputs = fused_batch_nll(model, inputs)  # the first call compares logits of three tokens
    calls.clear()
    again, _ = fused_batch_nll(model, inputs)
    assert calls == [] and torch.equal(got, again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "logits" not in outputs and outputs.last_hidden_state.shape[:2] == inputs["input_ids"].shape


def test_models_that_accelerate_has_prepared_run_in_its_precision(rng_seed):
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    plain = make_model("gemma2", seed=rng_seed)
    model = accelerator.prepare_model(copy.deepcopy(plain))
    inputs = collate([make_row() for _ in range(3)])
    want, _ = batch_nll(model, inputs)
    got, outputs = fused_batch_nll(model, inputs)
    assert outputs.last_hidden_state.dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert fused_batch_nll(plain, inputs)[1].last_hidden_state.dtype == torch.float32


@pytest.fixture
def registry():
    trainer = pmc_trainer(FinetuneTrainer)
    return {trainer.__name__: trainer}


@pytest.mark.parametrize("name", ["tokenizer", "processing_class"])
@pytest.mark.parametrize("wrap", [lambda row: row, lambda row: {"original": row, "alternate": make_row()}])
def test_pmc_trains_from_its_registry(wrap, name, registry, tmp_path, rng_seed):
    model, dataset = make_model(seed=rng_seed), make_dataset(wrap)
    trainer = load_trainer(tmp_path / "whole", registry, dataset, model, name)
    assert trainer.forget_questions == [[10 + i, 11] for i in range(5)]
    before, batches = copy.deepcopy(model), []
    loss = trainer.pmc.loss

    def spied(forget, retain):
        value = loss(forget, retain)
        batches.append((forget, retain, trainer.pmc.stats["retain_loss"]))
        return value

    trainer.pmc.loss = spied
    trainer.train()
    assert sorted(index for forget, _, _ in batches[:3] for index in forget) == [0, 1, 2, 3, 4]
    forget, retain, retain_loss = batches[0]
    rows = [(list(row.question), list(row.answer)) for row in retain]
    known = [dataset.retain[index % 3] for index in forget]
    assert [q + a for q, a in rows] == [row["input_ids"].tolist() for row in known]
    nll, _ = batch_nll(before, collate(known))
    assert retain_loss == pytest.approx((nll.sum() / sum(len(answer) for _, answer in rows)).item(), rel=1e-3)
    assert all(entry.tokens[-1] == END for entry in trainer.pmc.ledger.entries.values())
    assert trainer.evaluate() == {"own": "theirs"}
    assert [entry["step"] for entry in trainer.state.log_history if "collapse_loss" in entry] == [1, 2, 3, 4]

    resumed = load_trainer(tmp_path / "whole", registry, dataset, make_model(seed=rng_seed), name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for ours, theirs in zip(model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_end_tokens_that_pad_are_part_of_the_prompt(registry, tmp_path):
    """As with Llama 3's <|eot_id|>, which the collator masks wherever it stands."""
    dataset = ForgetRetain([make_row([5, END, 6], [7]), make_row([8, 9, 10, END, 11], [12, 13])], [make_row()])
    trainer = load_trainer(tmp_path, registry, dataset, pad=END)
    assert trainer.forget_indices(collate([dataset[1], dataset[0]], pad=END)) == [1, 0]


def test_other_end_tokens_come_from_the_generation_config(registry, tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = [3, END]
    assert load_trainer(tmp_path, registry, make_dataset(), model).pmc.prompts.end_ids == (END, 3)


def test_the_configuration():
    documented = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert f"```yaml\n{open_unlearning.CONFIG}```" in documented
    config = yaml.safe_load(open_unlearning.CONFIG)
    assert config["handler"] == pmc_trainer(FinetuneTrainer).__name__ and config["defaults"] == ["finetune"]
    published = PMCConfig.published("llama-3.2-3b")
    assert PMCConfig(**config["method_args"]) == published
    assert config["args"]["num_train_epochs"] == published.epochs
    assert config["args"]["per_device_train_batch_size"] == published.batch_size
    assert config["args"]["gradient_accumulation_steps"] == published.accumulation
    assert float(config["args"]["learning_rate"]) == published.learning_rate


def test_bad_input(registry, tmp_path):
    with pytest.raises(UserError, match="train_dataset: got list without a forget set"):
        load_trainer(tmp_path, registry, [make_row()])
    text = {**make_row(), "labels": make_row()["input_ids"]}
    with pytest.raises(UserError, match="train_dataset.forget: row 0: got .* not running text"):
        load_trainer(tmp_path, registry, ForgetRetain([text], [make_row()]))
    with pytest.raises(UserError, match="train_dataset.forget: row 0 has 0, 1, expected"):
        load_trainer(tmp_path, registry, ForgetRetain([{0: make_row(), 1: make_row()}], [make_row()]))
    with pytest.raises(TypeError, match="gamma"):
        load_trainer(tmp_path, registry, make_dataset(), gamma=1.0)
    with pytest.raises(UserError, match="top_p: got 2"):
        load_trainer(tmp_path, registry, make_dataset(), top_p=2)
    with pytest.raises(UserError, match="model: got Linear"):
        fused_batch_nll(torch.nn.Linear(2, 2), collate([make_row()]))
    with pytest.raises(UserError, match='inputs: got input_ids, expected "input_ids" and "labels"'):
        fused_batch_nll(make_model(), {"input_ids": torch.tensor([[1]])})


def test_a_model_is_checked_once(rng_seed, monkeypatch):
    model, inputs, checks = make_model(seed=rng_seed), collate([make_row()]), []
    check = LanguageModel._check
    monkeypatch.setattr(LanguageModel, "_check", lambda lm: (checks.append(1), check(lm)))
    fused_batch_nll(model, inputs)
    fused_batch_nll(model, inputs)
    assert checks == [1]
    fused_batch_nll(copy.deepcopy(model), inputs)
    assert checks == [1, 1]


def test_the_ledger_can_be_written(registry, tmp_path):
    trainer = load_trainer(tmp_path, registry, make_dataset())
    trainer.train()
    held = json.loads((tmp_path / "checkpoint-4" / "pmc.json").read_text())
    assert held["ledger"]["questions"] == trainer.forget_questions
