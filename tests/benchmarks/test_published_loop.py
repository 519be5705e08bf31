"""The published loop follows the rules it is published with."""

import copy
import math
from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.published_loop import PublishedConfig, PublishedLoop, Samples, Stored

END, PAD, VOCAB = 256, 257, 258


class BytePrompts:
    """One token per byte."""

    def __init__(self, pad_id=PAD):
        self.end_ids = (END,)
        self.pad_id = pad_id

    def prompt_ids(self, question):
        return list(f"Q: {question}\nA:".encode())

    def answer_ids(self, answer):
        return [*f" {answer}".encode(), END]

    def decode(self, ids):
        return bytes(token for token in ids if token < END).decode(errors="replace").strip()


@dataclass
class Row:
    question: str
    answer: str


@pytest.fixture
def model(rng_seed):
    torch.manual_seed(rng_seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that greedy answers are not decided by rounding
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def loop_over(model, questions=("Who?", "Which river?"), pad_id=PAD, **config):
    loop = PublishedLoop(model, BytePrompts(pad_id), PublishedConfig(**{"max_length": 40, **config}))
    loop.questions = list(questions)
    loop.references = ["the quick brown fox"] * len(questions)
    return loop


@torch.no_grad()
def greedy(model, prompt, length):
    """Greedy decoding of one unpadded prompt without a cache, up to `length` tokens in all or the end token."""
    ids = list(prompt)
    while len(ids) < length and (len(ids) == len(prompt) or ids[-1] != END):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_ignore_padding_and_length_counts_the_padded_prompt(model):
    loop = loop_over(model)
    loop.initialise(["Who?", "Which river flows?"])
    width = max(len(loop.prompts.prompt_ids(question)) for question in loop.questions)
    want = []
    for question in loop.questions:
        prompt = loop.prompts.prompt_ids(question)
        want.append(loop.prompts.decode(greedy(model, prompt, len(prompt) + 40 - width)))
    assert loop.references == want


def test_top_k_1_draws_the_greedy_answer_every_time(model):
    loop = loop_over(model, num_samples=3, top_k=1)
    loop.initialise(loop.questions)
    samples = loop.sample([1, 0])
    texts = [[loop.prompts.decode(ids) for ids in row] for row in samples.ids]
    assert texts == [[loop.references[1]] * 3, [loop.references[0]] * 3]


def test_samples_are_asked_for_as_published(model, monkeypatch):
    calls = []
    generate = model.generate

    def spy(input_ids, attention_mask, generation_config):
        calls.append((input_ids.clone(), attention_mask.clone(), generation_config))
        assert not model.training
        return generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config)

    monkeypatch.setattr(model, "generate", spy)
    model.train()
    loop = loop_over(model, num_samples=4)
    samples = loop.sample([0, 1])
    assert model.training
    [(input_ids, mask, options)] = calls
    prompts = [loop.prompts.prompt_ids(question) for question in loop.questions]
    padding = len(prompts[1]) - len(prompts[0])
    assert input_ids.tolist() == [[PAD] * padding + prompts[0], prompts[1]]
    assert mask.tolist() == [[0] * padding + [1] * len(prompts[0]), [1] * len(prompts[1])]
    assert options.do_sample and options.num_return_sequences == 4
    assert (options.temperature, options.top_k, options.top_p, options.max_length) == (0.9, 50, 0.95, 40)
    assert (options.eos_token_id, options.pad_token_id) == ([END], PAD)
    assert [len(row) for row in samples.ids] == [4, 4]
    assert all(1 <= len(ids) <= 40 - input_ids.shape[1] for row in samples.ids for ids in row)


@pytest.mark.parametrize("pad_id", [PAD, END], ids=["pad", "end token as pad"])
def test_padding_behind_the_end_token_is_not_sampled(model, monkeypatch, pad_id):
    width = len(BytePrompts().prompt_ids("Who?"))
    answers = [[5, END, pad_id, pad_id], [END, pad_id, pad_id, pad_id], [5, 6, 7, END], [5, 6, 7, 8]]
    output = torch.tensor([[1] * width + answer for answer in answers])
    monkeypatch.setattr(model, "generate", lambda **_: output)
    loop = loop_over(model, questions=["Who?"], num_samples=4, pad_id=pad_id)
    samples = loop.sample([0])
    assert samples.ids == [[[5, END], [END], [5, 6, 7, END], [5, 6, 7, 8]]]
    assert samples.count == 11


def test_prompts_that_leave_no_room_are_refused(model):
    longest = len(BytePrompts().prompt_ids("Which river?"))
    with pytest.raises(ValueError, match=f"max_length: got {longest}, want more than the longest prompt .{longest}."):
        loop_over(model, max_length=longest).sample([0, 1])
    samples = loop_over(model, max_length=longest + 1, num_samples=2).sample([0, 1])
    assert [[len(ids) for ids in row] for row in samples.ids] == [[1, 1], [1, 1]]


def test_settings_are_the_published_ones():
    published = {"num_samples": 20, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_length": 200, "min_len": 0}
    assert asdict(PublishedConfig()) == {**published, "retain_weight": 1.25}


def test_first_answers_are_taken_in_batches_and_anew(model, monkeypatch):
    sizes, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: sizes.append(len(given["input_ids"])) or generate(**given))
    loop = loop_over(model)
    loop.stored = {0: Stored("no", 0.5)}
    loop.initialise([f"Who is {name}?" for name in "abcde"], batch_size=2)
    assert sizes == [2, 2, 1] and len(loop.references) == 5 and not loop.stored


def test_score_is_rouge_l_recall_with_stems(model):
    loop = loop_over(model)
    # lcs "the ... brown fox" of 4 words; "foxes" and "jumping" share stems with "fox" and "jumped"
    assert loop.score_of("the quick brown fox", "The slow brown foxes!") == 3 / 4
    assert loop.score_of("it jumped", "jumping it") == 1 / 2
    assert loop.score_of("the quick brown fox", "...") == 0


def test_short_answers_are_penalised_only_below_min_len(model):
    reference = "the quick brown fox"
    assert loop_over(model).score_of(reference, "fox") == 1 / 4
    strict = loop_over(model, min_len=3)
    assert strict.score_of(reference, "quick fox") == 2 / 4 + math.exp(-2)
    assert strict.score_of(reference, "no quick fox") == 2 / 4
    assert strict.score_of(reference, "") == math.exp(-1)  # nothing, split at spaces, is one part
    assert strict.score_of("fox", "fox") == 1


def encoded(*answers):
    return [[*answer.encode(), END] for answer in answers]


def test_best_sample_is_kept_the_first_on_ties(model):
    loop = loop_over(model, questions=["Who?", "What?"])
    loop.score([1], Samples([encoded("the quick dog", "a fox", "one quick cat", "the brown fox")]))
    assert loop.stored == {1: Stored("a fox", 1 / 4)}


def test_stored_answer_gives_way_unless_strictly_better_and_0_is_final(model):
    loop = loop_over(model, questions=["Who?", "What?"])
    loop.score([0, 1], Samples([encoded("brown fox"), encoded("fox")]))
    loop.score([0, 1], Samples([encoded("quick brown fox"), encoded("brown")]))
    assert loop.stored == {0: Stored("brown fox", 2 / 4), 1: Stored("brown", 1 / 4)}
    assert loop.pending([0, 1]) == [0, 1]
    loop.score([1], Samples([encoded("nothing")]))
    assert loop.stored[1] == Stored("nothing", 0.0)
    assert loop.pending([1, 0]) == [0]


def mean_nll(model, prompts, rows):
    """The mean over all answer tokens, each row on its own, in float64."""
    total, count = 0.0, 0
    for row in rows:
        prompt, answer = prompts.prompt_ids(row.question), prompts.answer_ids(row.answer)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        count += len(answer)
    return total / count


def test_training_takes_the_weighted_means_over_answer_tokens(model):
    loop = loop_over(model, max_length=48, retain_weight=1.25)
    # the first is longer than max_length: it was cut off when sampled, and has its end token all the same
    loop.stored = {0: Stored("as long an answer as they come " * 2, 0.5), 1: Stored("no", 0.25)}
    truth = [Row("Who?", "a fox"), Row("Which river?", "the Styx")]
    retain = [Row("How many?", "three"), Row("Why?", "because it is so"), Row("When?", "at noon")]
    double = copy.deepcopy(model).double()
    stored = [Row(question, loop.stored[i].answer) for i, question in enumerate(loop.questions)]
    want = [mean_nll(double, loop.prompts, rows) for rows in (stored, retain, truth)]
    (want[0] + 1.25 * want[1]).backward()

    losses = loop.train([0, 1], truth, retain, None)
    assert [losses.collapse, losses.retain, losses.truth] == pytest.approx([loss.item() for loss in want], rel=1e-5)
    for got, exact in zip(model.parameters(), double.parameters(), strict=True):
        assert (got.grad - exact.grad).norm() <= 1e-4 * exact.grad.norm() + 1e-7


def test_training_runs_the_head_on_every_position_of_padded_rows(model):
    shapes = []
    model.register_forward_hook(
        lambda _, args, kwargs, output: shapes.append((tuple(output.logits.shape), output.loss.requires_grad)),
        with_kwargs=True,
    )
    loop = loop_over(model, max_length=48)
    loop.stored = {0: Stored("no", 0.5)}
    loop.train([0], [Row("Who?", "a fox")], [Row("Why?", "so"), Row("When?", "noon")], None)
    assert shapes == [((1, 48, VOCAB), True), ((2, 48, VOCAB), True), ((1, 48, VOCAB), False)]


def test_the_optimizer_steps_and_gradients_are_let_go(model):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loop = loop_over(model)
    loop.stored = {0: Stored("no", 0.5)}
    loop.train([0], [Row("Who?", "a fox")], [Row("Why?", "so")], torch.optim.AdamW(model.parameters(), lr=0.01))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))
