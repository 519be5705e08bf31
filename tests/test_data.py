"""Question/answer files: what is written is read back, and what is wrong is named by file and line."""

import json
import random

import pytest

from pmc_fast.data import QA, read_jsonl, write_jsonl
from pmc_fast.errors import UserError


def test_round_trip(rng_seed, tmp_path):
    rng = random.Random(rng_seed)
    letters = 'aé東🦦"\\{}:,\n\r\t\u2028\x85\x0b '
    text = lambda: "q" + "".join(rng.choices(letters, k=rng.randint(0, 29)))  # noqa: E731
    rows = [QA(text(), text()) for _ in range(37)]
    path = tmp_path / "made" / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert len(path.read_bytes().splitlines()) >= len(rows) and read_jsonl(str(path)) == rows


def test_other_keys_blank_lines_byte_order_mark_and_windows_line_ends_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question": "q", "answer": "a", "id": 3}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n  \n" + json.dumps(row).encode())
    assert read_jsonl(path) == [QA("q", "a")] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"question": "q", "answer": "a"', "not JSON"),
        (b'{"question": "q", "answer": "a"} {"question": "q", "answer": "a"}', "not JSON"),
        (b'{"question": "q", "answer": "\xff"}', "not UTF-8"),
        (b'{"question": "q", "answer": "\\ud800"}', '"answer".*not UTF-8'),
        (b'["q", "a"]', "got a value of type list, want an object"),
        (b'"q"', "got 'q', want an object"),
        (b"null", "got None, want an object"),
        (b'{"answer": "a"}', 'no "question"'),
        (b'{"question": "q"}', 'no "answer"'),
        (b'{"question": "q", "answer": 3}', '"answer" is 3, want a string'),
        (b'{"question": true, "answer": "a"}', '"question" is True, want a string'),
        (b'{"question": "", "answer": "a"}', '"question" is empty'),
        (b'{"question": "q", "answer": " \\n"}', '"answer" is empty'),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"rows.jsonl:3: .*{message}"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="rows.jsonl: the file is empty"):
        read_jsonl(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.jsonl: no such file"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="cannot be read .*directory"):
        read_jsonl(tmp_path)


def test_rows_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="^rows: got None, expected a list of QA$"):
        write_jsonl(tmp_path / "rows.jsonl", None)
    assert not list(tmp_path.iterdir())
