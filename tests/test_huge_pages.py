import argparse
import mmap
from pathlib import Path

import pytest
import torch

from pmc_fast import doctor, huge_pages

SUPPORTED = Path("/sys/kernel/mm/transparent_hugepage").exists() and hasattr(mmap, "MADV_HUGEPAGE")


@pytest.mark.parametrize("nbytes", [0, 1, huge_pages.PAGE - 1, huge_pages.PAGE, 3 * huge_pages.PAGE + 5])
def test_memory_is_as_long_as_asked_for_and_can_be_written(nbytes):
    one, other = huge_pages.empty(nbytes), huge_pages.empty(nbytes)
    assert one.shape == (nbytes,) and one.dtype == torch.uint8 and one.device.type == "cpu"
    one.fill_(1), other.fill_(2)
    assert (one == 1).all() and (other == 2).all()


def flags_of(address: int) -> list[str]:
    """What the system notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(not SUPPORTED, reason="needs Linux with transparent huge pages")
def test_memory_begins_with_a_huge_page_and_asks_for_them():
    memory = huge_pages.empty(3 * huge_pages.PAGE)
    assert memory.data_ptr() % huge_pages.PAGE == 0
    assert "hg" in flags_of(memory.data_ptr())
    address = memory.data_ptr()
    del memory
    assert "hg" not in flags_of(address)


def test_a_kernel_without_huge_pages_gives_memory_all_the_same(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Refusing)
    assert huge_pages.empty(huge_pages.PAGE).fill_(3).sum() == 3 * huge_pages.PAGE


def test_a_system_other_than_linux_gives_memory_all_the_same(monkeypatch):
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.empty(huge_pages.PAGE).fill_(3).sum() == 3 * huge_pages.PAGE


@pytest.mark.parametrize(
    ("text", "setting", "said"),
    [
        ("always madvise [never]\n", "never", "switched off"),
        ("always [madvise] never\n", "madvise", "used (madvise)"),
        ("[always] madvise never\n", "always", "used (always)"),
        (None, None, "none"),
    ],
)
def test_doctor_says_whether_the_system_gives_them(tmp_path, monkeypatch, capsys, text, setting, said):
    file = tmp_path / "enabled"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(huge_pages, "_SETTING", file)
    assert huge_pages.setting() == setting
    doctor.doctor(argparse.Namespace(threads=None))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("huge pages")]
    assert said in line
