"""Small tokenizers of every way of decoding, and tokens to draw from them that are hard to decode bit by bit."""

import functools

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from pmc_fast.prompts import Prompts

# Whole and half words, boundaries of every kind, and characters whose lower case is or holds a letter of a to z.
PIECES = """ the| capital|cap|ital|s|ing| run|The|THE|k|K|i|\u212a|\u0130| \u212a|a|7| 0|nt|'| '|,| ,|.| .|-|_| |  |\n|\t
|\u3000|\u00a0|\u0307|\u03a3|東|京| 🦦|ß|\ufffd|x\ufffd|<0x41>|▁""".split("|")
CUT = ["\u212a", "\u0130", "🦦", "\u3000", "▁", "東"]  # whose bytes are tokens too
SPECIAL = ["<s>", "</s>", "<|x|>"]
WORDS = "the capital capitals cap ital run running k i a 7 0 nt ing thecap".split()


def wrap(vocabulary, decoder, unknown=None):
    """A tokenizer of one's vocabulary, two special tokens, an end token and two added tokens that are plain text."""
    tokens = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    model = models.WordLevel(tokens, unk_token=unknown) if unknown else models.BPE(tokens, [])
    tokenizer = Tokenizer(model)
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("run ", special=False), AddedToken(" été", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def names_of_bytes():
    """The characters that ByteLevel writes the bytes 0 to 255 as (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    names = [chr(b if b in plain else next(rest)) for b in range(256)]
    assert set(names) == set(ByteLevel.alphabet())
    return names


def byte_level():
    names = names_of_bytes()
    texts = [piece.encode() for piece in PIECES]
    texts += [part for text in map(str.encode, CUT) for k in range(1, len(text)) for part in (text[:k], text[k:])]
    return wrap([*names, *("".join(names[b] for b in text) for text in texts)], decoders.ByteLevel())


def spaced(pieces):
    return [piece.replace(" ", "▁") for piece in pieces]


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_fallback():
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return wrap([*BYTES, "<0x6b>", *spaced(PIECES)], decoders.Sequence(stages))


def gemma():
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return wrap([*BYTES, *spaced(PIECES)], decoders.Sequence(stages))


TOKENIZERS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, no strip": gemma,
    "metaspace": lambda: wrap(spaced(PIECES), decoders.Metaspace()),
    "metaspace, never first": lambda: wrap(spaced(PIECES), decoders.Metaspace(prepend_scheme="never")),
    "words": lambda: wrap(PIECES, None, unknown="a"),
}
PROMPTS = {kind: Prompts(make(), "plain") for kind, make in TOKENIZERS.items()}


@functools.cache
def pools(prompts):
    """Lists of tokens to draw from: pieces, bytes of cut characters, words, all there are, and some there are not."""
    tokenizer = prompts.tokenizer
    size, known = len(tokenizer), tokenizer.get_vocab()
    named = [i for i in range(size) if len(tokenizer.convert_ids_to_tokens(i)) > 1]
    wanted = [*(b for text in CUT for b in text.encode()), *b"a k\n"]
    halves = [known[name] for names in (BYTES, names_of_bytes()) for b in wanted if (name := names[b]) in known]
    words = [i for i in range(size) if prompts.decode([i]).lower() in WORDS]
    parts = [named, halves, words, [*range(size), size, size + 7]]
    ends = set(prompts.end_ids)
    return [kept for part in parts if (kept := [i for i in part if i not in ends])]


@functools.cache
def spoken(prompts):
    """The tokens of the words that references are made of in the simulation."""
    return [i for i in range(len(prompts.tokenizer)) if prompts.decode([i]) in ("the", "capital", "run", "0")]


def answers(prompts):
    return st.lists(st.one_of([st.sampled_from(part) for part in pools(prompts)]), max_size=24)
