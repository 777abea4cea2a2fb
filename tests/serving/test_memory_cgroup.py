"""The control group that holds instances to their memory, on trees of files like those of the kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from memory_cgroup import MemoryCgroup

LIMIT = 320 << 20


@pytest.mark.parametrize("controllers", ["memory pids", "pids"], ids=["memory enabled", "memory not enabled"])
def test_a_group_of_version_2_leaves_the_tree_as_it_was(controllers: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset memory pids")
    control = tmp_path / "cgroup.subtree_control"
    control.write_text(controllers)
    group = MemoryCgroup(LIMIT, tmp_path)
    assert (group.version, group.folder.parent) == (2, tmp_path)
    assert control.read_text() == (controllers if "memory" in controllers else "+memory")
    assert contents(group.folder) == {"memory.max": str(LIMIT)}
    (group.folder / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n")
    assert group.oom_kills == 1
    run_within(group)
    remove_files(group.folder)
    with group:
        pass
    assert not group.folder.exists()
    assert control.read_text() == (controllers if "memory" in controllers else "-memory")


def test_a_group_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    group = MemoryCgroup(LIMIT, tmp_path)
    assert (group.version, group.folder.parent) == (1, tmp_path / "memory")
    assert contents(group.folder) == {"memory.limit_in_bytes": str(LIMIT)}
    (group.folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert group.oom_kills == 3
    run_within(group)
    remove_files(group.folder)
    with group:
        pass
    assert not group.folder.exists()


def test_the_group_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    parent = tmp_path / "memory"
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, used, foreign = (parent / f"{name}-5" for name in (f"hotset-test-{dead.pid}", "hotset-test-1", "other-1"))
    for folder in (left, used, foreign):
        folder.mkdir(parents=True)
    group = MemoryCgroup(LIMIT, tmp_path)
    assert {*parent.iterdir()} == {group.folder, used, foreign}


def test_no_groups_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MemoryCgroup(LIMIT, tmp_path)


def run_within(group: MemoryCgroup) -> None:
    """The command enters the group before it becomes the program."""
    done = subprocess.run(group.command("sh", "-c", "echo $$"), capture_output=True, text=True, check=True)
    assert (group.folder / "cgroup.procs").read_text() == done.stdout


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def remove_files(folder: Path) -> None:
    """Those of the kernel go with their folder."""
    for path in folder.iterdir():
        path.unlink()
