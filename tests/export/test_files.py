"""Files and folders appear whole; errors say what to do next."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from factorportrait import files
from factorportrait.errors import BundleError, CheckpointError, MediaError, UserError
from factorportrait.files import part_path, whole_file, whole_folder

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"UserError", "BundleError", "CheckpointError", "MediaError"}


def make(path: Path, content: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").write_text(content)
    return path


def left_over(path: Path, kind: str, *, process: int, machine: str | None = None) -> Path:
    """A hidden folder as `whole_folder` makes it."""
    machine = machine or files._machine()
    return make(path.with_name(f".{path.stem}.{machine}-{process}-0123abcd.{kind}{path.suffix}"), kind)


@pytest.fixture(scope="module")
def gone() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", [".", "", "..", "sub/.."])
def test_paths_without_a_name(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    part = part_path(name)
    target = Path(name).resolve()
    assert part.parent == target.parent and part.name.startswith(f".{target.name}.")


def test_root_has_no_name():
    with pytest.raises(UserError, match="cannot write /; expected a path with a name"):
        part_path("/")
    with pytest.raises(UserError, match="cannot write"), whole_folder("/"):
        pass


def test_the_suffix_stays(tmp_path):
    assert part_path(tmp_path / "clip.mp4").suffix == ".mp4"
    with pytest.raises(UserError, match="cannot write"), whole_file(tmp_path) as file:
        file.write_text("a file where a folder is")


def test_folder_through_a_link(tmp_path):
    real = make(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(real)
    with whole_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (real / "file").read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_old_folder_comes_back_when_the_new_one_cannot_be_put_there(tmp_path, monkeypatch):
    target, real, calls = make(tmp_path / "bundle", "old"), os.replace, []

    def second_fails(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(UserError, match="the disk is full"), whole_folder(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_left_over_folders_of_processes_that_are_gone(tmp_path, gone):
    target = make(tmp_path / "a.bundle", "old")
    dead = left_over(target, "part", process=gone)
    kept = [
        left_over(target, "part", process=os.getpid()),  # at work
        left_over(target, "part", process=gone, machine="00000000"),  # perhaps at work on another machine
        left_over(tmp_path / "a.other", "part", process=gone),  # of another target
        make(tmp_path / ".a.notes.part.bundle", "somebody's"),
    ]
    days_old = left_over(target, "part", process=1, machine="11111111")
    for path in (days_old, days_old / "file"):
        os.utime(path, (0, 0))
    with whole_folder(target) as folder:
        assert not dead.exists() and not days_old.exists() and all(path.exists() for path in kept)
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


def test_killed_between_the_two_renames(tmp_path, gone):
    """The old version is the only one, until the new one is whole."""
    target = tmp_path / "bundle"
    left_over(target, "old", process=gone)
    with pytest.raises(KeyError), whole_folder(target):
        raise KeyError
    assert (target / "file").read_text() == "old"
    shutil.rmtree(target)
    left_over(target, "old", process=gone)
    with whole_folder(target) as folder:
        (folder / "file").write_text("new")
    assert list(tmp_path.iterdir()) == [target] and (target / "file").read_text() == "new"


def test_errors_need_an_action_and_survive_pickling():
    for kind in (UserError, BundleError, CheckpointError, MediaError):
        with pytest.raises(TypeError, match="action"):
            kind("a file")
        error = kind("a file", expected="this", found="that", action="do it")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) == "a file; expected this; found that; do it"
        assert vars(again) == vars(error)


@pytest.mark.parametrize("folder", ["factorportrait", "export", "engines", "runtime", "benchmarks", "demo"])
def test_every_error_names_an_action(folder):
    bad = []
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ERRORS:
                actions = [keyword.value for keyword in node.keywords if keyword.arg == "action"]
                if not actions or isinstance(actions[0], ast.Constant) and not actions[0].value:
                    bad.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not bad
