"""Pruning picks what sampling to the end would have picked."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizer_kinds import PROMPTS, byte_level, pools, spoken

from pmc_fast.ledger import Entry, Ledger
from pmc_fast.pmc import PMC
from pmc_fast.prompts import Prompts
from pmc_fast.pruning import Pruner, has_lower_bound
from pmc_fast.rewards import Reward, RougeRecall

# The simulation: an answer is a stream of tokens drawn beforehand, so there are no numbers of a model to differ.


class Blind(Prompts):
    """Decodes as Prompts does, which a pruner cannot know."""

    def decode(self, ids):
        return super().decode(ids)


def streams(rng, prompts, batch, n, steps):
    """Tokens [batch * n, steps] made mostly of few words, so that scores tie and reach 0; some have no end token."""
    parts, usual = pools(prompts), spoken(prompts)
    drawn = np.empty((batch * n, steps), dtype=np.int64)
    for row in drawn:
        common = rng.choice([1.0, 0.9, 0.5])
        end = rng.choice([0, 0.02, 0.1, 0.3])
        for t in range(steps):
            row[t] = rng.choice(usual if rng.random() < common else rng.choice(parts))
            if rng.random() < end:
                row[t] = prompts.end_ids[0]
    return drawn


def sample(prompts, drawn, limits, pruner=None):
    """The sampler's loop over streams drawn beforehand; returns tokens, lengths, finished, dropped [rows, ...]."""
    rows, steps = drawn.shape
    tokens = torch.from_numpy(drawn).flip(1)  # something else than the answers, past their lengths
    lengths = torch.as_tensor(limits).clone()
    finished, dropped = torch.zeros(2, rows, dtype=torch.bool)
    slots = torch.randperm(rows)  # the order of the rows is the sampler's business
    for step in range(steps):
        tokens[slots, step] = torch.from_numpy(drawn)[slots, step]
        ended = torch.isin(tokens[slots, step], torch.tensor(prompts.end_ids))
        finished[slots[ended]] = True
        done = ended | (torch.as_tensor(limits)[slots] == step + 1)
        lengths[slots[done]] = step + 1
        slots = slots[~done]
        if pruner and (stop := pruner(slots, tokens[:, : step + 1], lengths)) is not None:
            lengths[slots[stop]], dropped[slots[stop]] = step + 1, True
            slots = slots[~stop]
        if len(slots) == 0:
            break
    return tokens, lengths, finished, dropped


def visit(ledger, questions, prompts, reward, drawn, limits, n, keep_truncated, pruner=None):
    """What PMC does with samples; returns the number of sampled tokens, and of answers dropped."""
    batch = len(questions)
    cut = (0, batch // 3, batch)  # the sampler may take the questions in turns
    parts = [(slice(a * n, b * n), pruner and pruner.part(a, b)) for a, b in itertools.pairwise(cut)]
    parts = [sample(prompts, drawn[rows], limits[rows], part) for rows, part in parts]
    tokens, lengths, finished, dropped = (torch.cat(columns) for columns in zip(*parts, strict=True))
    assert not (dropped & finished).any()
    ids = [t[:k] for t, k in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    texts = [prompts.decode(i) for i in ids]
    references = [ledger.initial_answers[q] for q in questions for _ in range(n)]
    scores = np.where(dropped.numpy().reshape(batch, n), np.inf, reward.score(references, texts).reshape(batch, n))
    finished = finished.numpy().reshape(batch, n)
    config = SimpleNamespace(keep_truncated=keep_truncated, selection="best")
    picks = PMC._select(SimpleNamespace(config=config), scores, finished, None)
    for row, (question, pick) in enumerate(zip(questions, picks, strict=True)):
        at = row * n + pick
        ledger.offer(question, Entry(texts[at], (*ids[at], bool(finished[row, pick])), float(scores[row, pick])))
        ledger.visits[question] += 1
    return int(lengths.sum()), int(dropped.sum())


@pytest.mark.parametrize("keep_truncated", [True, False])
@pytest.mark.parametrize("min_words", [0, 4])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace", "blind"])
def test_same_ledger_as_without_pruning(kind, min_words, keep_truncated, rng_seed):
    rng = random.Random(rng_seed)
    prompts = PROMPTS[kind] if kind != "blind" else Blind(byte_level(), "plain")
    reward = RougeRecall(min_words=min_words)
    batch, steps, saved, whole, drops = 11, 19, 0, 0, 0
    for _ in range(15):
        references = [" ".join(rng.choices(["the", "capital", "run", "0"], k=rng.randint(1, 9))) for _ in range(batch)]
        full, pruned = (Ledger(["?"] * batch, references) for _ in range(2))
        for _ in range(3):  # the first time with no score held, then with some
            questions = [q for q in range(batch) if not full.is_final(q)]
            n, interval = rng.randint(1, 7), rng.randint(1, 5)
            drawn = streams(rng, prompts, len(questions), n, steps)
            limits = np.array(rng.choices([steps, rng.randint(1, steps)], k=len(drawn)))
            held = [pruned.entries[q].score if q in pruned.entries else np.inf for q in questions]
            asked = [references[q] for q in questions]
            pruner = Pruner(reward, prompts, asked, held, n, keep_truncated=keep_truncated, interval=interval)
            all_tokens, _ = visit(full, questions, prompts, reward, drawn, limits, n, keep_truncated)
            tokens, dropped = visit(pruned, questions, prompts, reward, drawn, limits, n, keep_truncated, pruner)
            assert pruned.state_dict() == full.state_dict()
            whole, saved, drops = whole + all_tokens, saved + all_tokens - tokens, drops + dropped
    assert drops > 0
    assert saved > (0 if kind == "blind" else 0.02 * whole)  # blind: only answers of score 0 drop others


def run_pruner(references, held, streams, **options):
    """Steps a pruner over words, one token each; returns when each answer was dropped (step, or None)."""
    prompts = PROMPTS["byte level"]
    words = {prompts.decode([i]): i for i in spoken(prompts)} | {"end": prompts.end_ids[0]}
    words["."] = prompts.tokenizer.convert_tokens_to_ids(".")
    longest = max(len(stream.split()) for stream in streams)
    drawn = np.array([[words[w] for w in (stream + " ." * longest).split()[:longest]] for stream in streams])
    n = len(streams) // len(references)
    pruner = Pruner(RougeRecall(), prompts, references, held, n, **{"interval": 1, **options})
    limits = np.array([len(stream.split()) for stream in streams])
    _, lengths, _, dropped = sample(prompts, drawn, limits, pruner)
    return [k if gone else None for k, gone in zip(lengths.tolist(), dropped.tolist(), strict=True)]


FINE = ". . . . end end"  # scores 0, after 5 tokens
HALF = "the . . . end end"  # 1/2 of "the capital", after 5 tokens
BOTH = "the . capital . . ."  # bounds 1/2 after 2 tokens, 1 after 4
NONE = float("inf")


@pytest.mark.parametrize(
    ("held", "streams", "when"),
    [
        (NONE, [BOTH, BOTH], [None, None]),
        (1.0, [BOTH, BOTH], [None, None]),  # as good as the one held replaces it
        (0.5, [BOTH, FINE], [4, None]),
        (0.1, [BOTH, FINE], [2, None]),
        (0.1, [BOTH, BOTH], [2, 2]),
        (NONE, [FINE, ". . . . . ."], [None, 5]),  # nothing is better than 0
        (NONE, [". . . . . .", FINE], [None, None]),  # but as good and first is
        (NONE, [HALF, BOTH], [None, 5]),
        (NONE, [BOTH, HALF], [5, None]),
        (NONE, [HALF, "the . . . . ."], [None, 5]),  # as good and behind
        (NONE, ["the . . . . .", HALF], [None, None]),
    ],
)
def test_rules_case_by_case(held, streams, when):
    assert run_pruner(["the capital"], [held], streams) == when


def test_cut_off_answers_are_not_let_win_by_a_drop():
    # The first answer ends, above the score held; the second, cut off, may be picked only if no answer ends.
    streams = ["the . . . . end", ". . . . . ."]
    assert run_pruner(["the capital"], [0.1], streams, keep_truncated=True) == [2, None]
    assert run_pruner(["the capital"], [0.1], streams, keep_truncated=False) == [None, None]
    # All are above it: none can be picked, whichever end.
    streams = ["the . . . . end", ". . the . . ."]
    assert run_pruner(["the capital"], [0.1], streams, keep_truncated=False) == [4, 4]
    # Not all are: the last, cut off already, is picked if the first does not end either.
    streams = ["the . . . . .", ". . . . . .", "0 0"]
    assert run_pruner(["the capital"], [0.1], streams, keep_truncated=False) == [None, None, None]
    # Cut off, an answer of score 0 is picked only if none ends.
    assert run_pruner(["the capital"], [NONE], ["0 0", "the . . ."], keep_truncated=True) == [None, 2]
    assert run_pruner(["the capital"], [NONE], ["0 0", "the . . ."], keep_truncated=False) == [None, None]
    # One has ended: cut-off ones are out in any case.
    streams = ["the . . . . end", "the end end end end end", ". . . . . ."]
    assert run_pruner(["the capital"], [0.1], streams, keep_truncated=False) == [2, None, None]


def test_questions_do_not_mix_and_looks_keep_their_interval():
    streams = [FINE, ". . . . . .", BOTH, BOTH]
    assert run_pruner(["the capital", "the capital"], [NONE, 0.1], streams, interval=1) == [None, 5, 2, 2]
    assert run_pruner(["the capital", "the capital"], [NONE, 0.1], streams, interval=3) == [None, None, 3, 3]
    assert run_pruner(["the capital", "run"], [NONE, 0.1], streams, interval=1) == [None, 5, None, None]
    assert Pruner(RougeRecall(), PROMPTS["byte level"], ["a", "b"], [NONE] * 2, 2, interval=3).part(1, 2).interval == 3


class Changed(RougeRecall):
    def score(self, references, candidates):
        return 1 - super().score(references, candidates)


class ChangedBoth(Changed):
    def lower_bound(self, references, beginnings):
        return np.zeros(len(beginnings))


class OfProtocol(Reward):
    def score(self, references, candidates):
        return np.zeros(len(candidates))


def test_which_rewards_have_a_bound():
    assert has_lower_bound(RougeRecall()) and has_lower_bound(ChangedBoth())
    assert not any(map(has_lower_bound, [Changed(), OfProtocol(), object(), None]))


class Odd:
    def __init__(self, score=0.5, bound=0.0):
        self.values = {"score": score, "bound": bound}

    def score(self, references, candidates):
        return np.full(len(candidates), self.values["score"])

    def lower_bound(self, references, beginnings):
        return np.full(len(beginnings), self.values["bound"])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"reward": Changed()}, TypeError, "reward: Changed has no lower_bound"),
        ({"num_samples": 0}, ValueError, "num_samples: got 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples: got 1.0"),
        ({"interval": 0}, ValueError, "interval: got 0"),
        ({"interval": True}, TypeError, "interval: got True"),
        ({"held": [1.0, 2.0]}, ValueError, r"held: got shape \[2\], expected \[1\]"),
        ({"held": [np.nan]}, ValueError, "held: got nan"),
        ({"references": "a"}, TypeError, "references: got a string"),
        ({"references": [3]}, TypeError, "references: got 3 at position 0"),
        ({"reward": Odd(bound=[0.0, 1.0])}, ValueError, r"lower_bound gave|broadcast"),
        ({"reward": Odd(bound=np.nan)}, ValueError, "reward: Odd.lower_bound gave nan for candidate 0"),
    ],
)
def test_bad_arguments(changes, error, match):
    arguments = {"reward": RougeRecall(), "references": ["a"], "held": [NONE], "num_samples": 2, "interval": 1}
    with pytest.raises(error, match=match):
        Pruner(prompts=PROMPTS["byte level"], **{**arguments, **changes})


def test_bad_steps():
    def fresh(reward=None):
        return Pruner(reward or RougeRecall(), PROMPTS["byte level"], ["a"], [NONE], 2, interval=1)

    both, tokens, lengths = torch.tensor([0, 1]), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"expected \[R\], \[2, T\], \[2\]"):
        fresh()(both, tokens[:1], lengths)
    pruner = fresh()
    pruner(both[:1], tokens, lengths)
    with pytest.raises(ValueError, match="running: got answer 1, which was done"):
        pruner(both, tokens, lengths)
    for begin, end in [(0, 2), (-1, 1), (1, 0)]:
        with pytest.raises(ValueError, match=f"begin, end: got {begin}, {end}"):
            pruner.part(begin, end)
    with pytest.raises(ValueError, match="reward: .*score gave nan for candidate"):
        fresh(Odd(score=np.nan))(both[:1], tokens, lengths)


def test_scores_without_limit():
    # Infinite bounds with nothing finished: whichever is picked is stored, so none may go.
    pruner = Pruner(Odd(np.inf, np.inf), PROMPTS["byte level"], ["a"], [NONE], 3, interval=1)
    tokens, lengths = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    assert pruner(torch.arange(3), tokens, lengths) is None
    assert pruner(torch.tensor([2, 0]), tokens, lengths).tolist() == [True, False]
