"""The beginning of an answer under way, and the bound of its score, hold whatever it goes on to say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import BYTES, PIECES, PROMPTS, TOKENIZERS, WORDS, answers, byte_level, names_of_bytes, spaced, wrap
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from pmc_fast.prompts import Prompts
from pmc_fast.pruning import _Beginnings, _keeps_beginnings
from pmc_fast.rewards import RougeRecall


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_beginnings_and_bounds_hold_to_the_end(kind):
    prompts = PROMPTS[kind]
    assert _keeps_beginnings(prompts)

    @settings(max_examples=600, deadline=None)
    @given(
        answers(prompts),
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
        st.integers(0, 6),
        st.booleans(),
        st.integers(1, 5),
    )
    def check(ids, reference, min_words, use_stemmer, stride):
        reward = RougeRecall(min_words=min_words, use_stemmer=use_stemmer)
        text = prompts.decode(ids)
        reference = " ".join(reference)
        (score,) = reward.score([reference], [text])
        grown = _Beginnings(prompts)
        for length in range(0, len(ids) + 1, stride):
            once = _Beginnings(prompts).grow(0, np.array(ids[:length], dtype=np.int64))
            for beginning in (grown.grow(0, np.array(ids[:length], dtype=np.int64)), once):
                assert text.startswith(beginning)
                assert reward.lower_bound([reference], [beginning])[0] <= score
            assert len(beginning) >= len(settled(prompts, ids[:length]))

    check()


def settled(prompts, ids):
    """Of an answer's beginning, what pieces with no bytes of their own say: nothing more may be held back."""
    name = prompts.tokenizer.convert_ids_to_tokens
    alone = itertools.takewhile(
        lambda i: i < len(prompts.tokenizer) and "\ufffd" not in prompts.decode([i]) and not name(i).startswith("<0x"),
        ids,
    )
    return prompts.decode(list(alone)).rstrip()


@pytest.mark.parametrize(
    ("kind", "pieces", "beginnings"),
    [
        ("byte level", [" run", b"\xe2", b"\x84", b"\xaa"], ["run", "run", "run", "run\u212a"]),  # the Kelvin sign, "k"
        ("byte level", ["cap", " ", b"\xe3", b"\x80", b"\x80"], ["cap"] * 5),  # a wide space
        ("byte level", ["cap", b"\xff", " run"], ["cap", "cap", "cap\ufffd run"]),
        ("byte fallback", ["cap", b"a", b" ", b"\xff", " run"], ["cap"] * 4 + ["cap\ufffd\ufffd\ufffd run"]),
        ("byte fallback", ["cap", b"a", "<s>", b"\xff"], ["cap"] * 4),  # the special token parts no bytes
        ("byte fallback", ["cap", "<0x6b>", b" ", b"\xff"], ["cap"] * 4),  # lower-case names are bytes as well
        ("byte fallback", [" the", b"\n", " run", " "], ["the", "the", "the\n run", "the\n run"]),
        ("metaspace", [" the", " run", "s", " capital"], ["the", "the run", "the runs", "the runs capital"]),
    ],
)
def test_beginnings_case_by_case(kind, pieces, beginnings):
    prompts = PROMPTS[kind]
    names = names_of_bytes() if kind == "byte level" else BYTES
    space = "\u0120" if kind == "byte level" else "▁"
    written = [names[piece[0]] if isinstance(piece, bytes) else piece.replace(" ", space) for piece in pieces]
    ids = prompts.tokenizer.convert_tokens_to_ids(written)
    grown = _Beginnings(prompts)
    assert [grown.grow(0, np.array(ids[: k + 1])) for k in range(len(ids))] == beginnings


@settings(max_examples=1000, deadline=None)
@given(st.text(), st.text(), st.text(alphabet="aAkKiİ\u212a '.éΣ7"), st.integers(0, 5), st.booleans())
def test_bound_holds_for_any_text_that_goes_on(reference, beginning, end, min_words, use_stemmer):
    reward = RougeRecall(min_words=min_words, use_stemmer=use_stemmer)
    for wanted in (reference, f"{beginning} {end}", f"{end} {beginning}{end}"):
        bound = reward.lower_bound([wanted], [beginning])
        assert bound.dtype == np.float64 and bound.shape == (1,)
        assert bound <= reward.score([wanted], [beginning + end])
        assert bound <= reward.score([wanted], [beginning])


@pytest.mark.parametrize(
    ("beginning", "bound"),
    [("", 0), ("runs", 0), ("runs ", 1 / 3), ("a runs.", 1 / 3), ("Running to\n", 2 / 3), ("runs to pari", 2 / 3)],
)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_bound_is_the_recall_of_complete_words(beginning, bound, impl):
    for min_words in (0, 9):
        got = RougeRecall(min_words=min_words, impl=impl).lower_bound(["run to paris"], [beginning])
        assert got.tolist() == [bound]


def test_bound_of_own_tokenizer_is_zero():
    # This one finds a word in the empty text that longer texts lack.
    reward = RougeRecall(tokenizer=lambda text: text.split(" "))
    assert reward.lower_bound(["", "a b"], ["", "a b c"]).tolist() == [0, 0]


def test_bound_refuses_what_is_no_text():
    with pytest.raises(ValueError, match="1 texts, expected 2"):
        RougeRecall().lower_bound(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="got None at position 0"):
        RougeRecall().lower_bound(["a"], [None])


class TidyDecoder:
    def decode_chain(self, tokens):
        return tokens


def custom():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(TidyDecoder())
    return tokenizer


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


class Backwards(Prompts):
    def decode(self, ids):
        return super().decode(ids)[::-1]


def patched():
    tokenizer = byte_level()
    tokenizer.decode = lambda *args, **kwargs: "same"
    return Prompts(tokenizer, "plain")


def decoding(*stages):
    return lambda: Prompts(wrap([*BYTES, *spaced(PIECES)], decoders.Sequence(list(stages))), "plain")


@pytest.mark.parametrize(
    "make",
    [
        decoding(decoders.CTC()),
        decoding(decoders.WordPiece()),
        decoding(decoders.BPEDecoder()),
        decoding(decoders.Fuse(), decoders.ByteFallback()),
        decoding(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("s", 0, 3)),
        decoding(decoders.Fuse(), decoders.Replace("the cap", "x")),
        lambda: Prompts(custom(), "plain"),
        lambda: Prompts(Shouting(tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>"), "plain"),
        lambda: Backwards(byte_level(), "plain"),
        patched,
    ],
)
def test_other_ways_of_decoding_are_not_trusted(make):
    assert not _keeps_beginnings(make())


def test_phi_tokenizer_is_trusted():
    from transformers.models.codegen.tokenization_codegen import CodeGenTokenizer

    tokenizer = CodeGenTokenizer(vocab={"a": 0, "Ġb": 1, "<|endoftext|>": 2}, merges=[])
    assert _keeps_beginnings(Prompts(tokenizer, "plain"))
