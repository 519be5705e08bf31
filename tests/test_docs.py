"""The pages of docs/: their Python runs, their commands parse, their links lead somewhere, their tables are the code's."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

import pmc_fast
from benchmarks import tables
from benchmarks.__main__ import _parse as parse_benchmarks
from benchmarks.models import is_wrong
from benchmarks.results import load
from pmc_fast.backend import IMPLEMENTATIONS, ONLY_IF_NAMED, PACKAGES
from pmc_fast.cli import make_parser
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA, write_jsonl
from pmc_fast.phases import PHASES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {page.name: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {
    "distributed.md": ['title="Not run: needs DeepSpeed"'],
    "integrations.md": ['title="Not run: lines of another repository"', 'title="Not run: needs vLLM and a GPU"'],
}
NEEDS = {"distributed.md": ("peft",), "integrations.md": ("accelerate", "peft")}


def blocks(page, language):
    """What follows the language, and the code, of each such block; a place in the file is kept for tracebacks."""
    found = []
    for match in BLOCK.finditer(TEXTS[page]):
        if match[1] == language:
            lines = TEXTS[page].count("\n", 0, match.start(3))
            found.append((match[2].strip(), "\n" * lines + match[3]))
    return found


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, rng_seed):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if page == "distributed.md":
        if torch.cuda.is_available():
            pytest.skip("its group is gloo's, and fully_shard would take the GPU")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    forget = [QA(f"Who is {name}?", f"A poet, {name}.") for name in ("Ada", "Bo", "Cyd", "Di")]
    retain = [QA(f"What is {name}?", f"The river {name}.") for name in ("Ob", "Po", "Oder")]
    given = {
        "model": make_model(seed=rng_seed),
        "base_model": make_model(seed=rng_seed),
        "tokenizer": make_tokenizer(),
        "forget_rows": forget,
        "forget_questions": [row.question for row in forget],
        "retain_rows": retain,
        "this_ranks_batches": [([0, 1], retain[:2]), ([2], retain[2:])],
    }
    given["batches"] = given["this_ranks_batches"]
    skipped = []
    try:
        for title, code in blocks(page, "python"):
            if page == "distributed.md":  # what shares out a model takes a whole one
                given["model"] = make_model(seed=rng_seed)
            compiled = compile(code, str(DOCS / page), "exec")
            if title:
                skipped.append(title)
            else:
                exec(compiled, given)
    finally:
        if page == "distributed.md":
            dist.destroy_process_group()
    assert skipped == NOT_RUN.get(page, [])


def test_the_loop_of_the_readme_runs(tmp_path, monkeypatch, rng_seed):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS.parent / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    make_model(seed=rng_seed).save_pretrained(tmp_path / "MODEL")
    make_tokenizer().save_pretrained(tmp_path / "MODEL")
    for name in ("forget", "retain"):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [QA(f"Who is {who}?", f"A poet, {who}.") for who in ("Ada", "Bo", "Cyd")]
        )
    monkeypatch.chdir(tmp_path)
    short = 'published("llama-3.2-3b", epochs=2, num_samples=3, max_length=60)'
    given = {}
    exec(code.replace('published("llama-3.2-3b")', short), given)
    assert given["pmc"].ledger.visits == [2, 2, 2] or 0 in {
        entry.score for entry in given["pmc"].ledger.entries.values()
    }
    saved = load_file(tmp_path / "OUT" / "model.safetensors")
    trained = given["model"].state_dict()
    assert saved and all(torch.equal(trained[name], value) for name, value in saved.items())


def test_commands_parse():
    count = 0
    for page in TEXTS:
        for _, code in blocks(page, "sh"):
            for line in filter(None, code.splitlines()):
                words = shlex.split(line, comments=True)
                if words[0] == "pmc-fast":
                    make_parser().parse_args(words[1:])
                elif words[:3] == ["python", "-m", "benchmarks"]:
                    parse_benchmarks(words[3:])
                else:
                    assert words[0] in ("make", "pip"), line
                count += 1
    assert count > 15


def anchors(text):
    """The anchors of a page's headings, and of the objects that it documents."""
    prose = BLOCK.sub("", text)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(documented(text))


def documented(text):
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]*)\)", BLOCK.sub("", TEXTS[page])):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (DOCS / name).resolve() if name else DOCS / page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_every_page_is_in_the_site():
    listed = re.findall(r"^  - (\S+\.md)$", (DOCS / "site" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*TEXTS, "numbers.md"])


def test_the_reference_has_every_public_name():
    found = {}
    for name in documented(TEXTS["api.md"]):
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(import_module(module), attribute)
    public = {name: getattr(pmc_fast, name) for name in pmc_fast.__all__ if name != "__version__"}
    missing = [name for name, value in public.items() if not any(value is there for there in found.values())]
    assert not missing and "`pmc_fast.__version__`" in TEXTS["api.md"]
    assert all(value.__doc__ for value in found.values())


def test_the_reference_names_a_module_that_has_it():
    """A heading is the module that readers import from; what stands under it may live deeper."""
    module = "pmc_fast"
    for line in TEXTS["api.md"].splitlines():
        if line.startswith("## "):
            module = {"The package": "pmc_fast"}.get(line[3:], line[3:])
        elif line.startswith("::: "):
            home, _, name = line[4:].rpartition(".")
            assert getattr(import_module(module), name) is getattr(import_module(home), name), line


def table(page, header):
    """The cells of the rows under a header."""
    lines = TEXTS[page].splitlines()
    start = lines.index(header) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines[start:end]]


def test_the_table_of_implementations():
    columns = ["reference", "native", "triton", "cuda"]
    rows = table("ops.md", f"| op | {' | '.join(columns)} |")
    assert sorted(columns) == sorted(PACKAGES) and ONLY_IF_NAMED == ("cuda",)
    there = {op: {name for name, cell in zip(columns, cells, strict=True) if cell} for op, *cells in rows}
    assert there == {op: set(names) for op, names in IMPLEMENTATIONS.items()}


def test_the_table_of_models():
    """As it is in the committed result, of which none is wrong."""
    content = load(DOCS.parent / "benchmarks" / "results" / "cpu_models.json")
    table, page = (" ".join(text.split()) for text in (tables.models(content), TEXTS["models.md"]))
    assert table in page
    assert content["environment"]["versions"]["transformers"] in TEXTS["models.md"]
    assert len(content["rows"]) > 150 and not any(map(is_wrong, content["rows"]))


def test_the_table_of_messages():
    """What is quoted of an error stands in the sources, the places of values aside."""
    sources = "".join(path.read_text() for path in sorted((DOCS.parent / "pmc_fast").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    pieces = [
        piece.strip()
        for message, _ in table("troubleshooting.md", "| message | do |")
        for piece in re.split(r"\.\.\.|\bN\b|\b[a-z_]+:|FILE:LINE:|PMC\.loss:", message)
    ]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 12 and [piece for piece in pieces if piece not in sources] == []


def test_the_table_of_phases():
    assert [row[0] for row in table("profiling.md", "| phase | what |")] == list(PHASES)


def test_the_table_of_published_settings():
    configs = [PMCConfig.published(name) for name in ("llama-3.2-3b", "phi-1.5")]
    rows, seen = table("pmc.md", "| | `llama-3.2-3b` | `phi-1.5` |"), 0
    for label, *cells in rows:
        names = [name for name in re.findall(r"\w+", label) if hasattr(configs[0], name)]
        for config, cell in zip(configs, cells, strict=True):
            if names:
                assert [float(value) for value in cell.split(", ")] == [getattr(config, name) for name in names], label
                seen += len(names)
    assert seen == 2 * 13
