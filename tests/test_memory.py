"""Free memory on a CPU is what the machine has and the control groups around the process leave."""

import pytest
import torch

from pmc_fast import memory

MACHINE = 1000 * 1024  # bytes
FREE_FILES = "active_file 7\ninactive_file 30\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def free():
    return memory.free_bytes(torch.device("cpu"))


def test_without_groups_it_is_the_machines(root):
    assert free() == MACHINE
    (root / "proc/self/cgroup").write_text("0::/\n")
    assert free() == MACHINE
    write(root / "sys/fs/cgroup", memory__max="max\n", memory__current="12\n", memory__stat=FREE_FILES)
    assert free() == MACHINE


def test_the_tightest_group_of_all_around_counts(root):
    (root / "proc/self/cgroup").write_text("0::/job/step\n")
    group = root / "sys/fs/cgroup/job"
    write(group, memory__max="5000\n", memory__current="4000\n", memory__stat=FREE_FILES)
    write(group / "step", memory__max="max\n", memory__current="3000\n", memory__stat=FREE_FILES)
    assert free() == 5000 - 4000 + 37
    write(group / "step", memory__max="3500\n")
    assert free() == 3500 - 3000 + 37
    write(group / "step", memory__current="9000\n")
    assert free() == 0
    write(group / "step", memory__max=f"{10 * MACHINE}\n")
    write(group, memory__max=f"{10 * MACHINE}\n")
    assert free() == MACHINE


def test_groups_of_version_1_and_paths_of_the_host(root):
    (root / "proc/self/cgroup").write_text("3:cpu,cpuacct:/other\n2:memory:/docker/0123\n0::/\n")
    names = {"memory__limit_in_bytes": "700\n", "memory__usage_in_bytes": "200\n"}
    write(
        root / "sys/fs/cgroup/memory",
        **names,
        memory__stat="inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 5\n",
    )
    assert free() == 700 - 200 + 55
