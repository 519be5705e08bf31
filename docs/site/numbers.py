"""A page of the README's numbers, with the pictures and result files that they link to."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
SECTION = "README.md#numbers"


def on_files(files, config):
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Numbers\n(.*?)<!-- end of numbers -->", text, re.DOTALL | re.MULTILINE)[1]
    section = section.replace("](docs/", "](").replace("](benchmarks/results/", "](results/")
    files.append(File.generated(config, "numbers.md", content=f"# Numbers\n{section}"))
    for name in sorted(set(re.findall(r"\]\((results/[^)]*)\)", section))):
        files.append(File.generated(config, name, content=(ROOT / "benchmarks" / name).read_text()))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace(f"](../{SECTION})", "](numbers.md)")
