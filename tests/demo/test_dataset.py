"""Data sets: repeatable, resumable, with people that splits do not share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from factorportrait.command import run_command
from factorportrait.errors import UserError


def test_a_seed_gives_the_same_clip():
    from demo.dataset import make_clip

    first, second = (make_clip("val", 3, 7, 5, 48) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["frames"], make_clip("val", 4, 7, 5, 48)["frames"])


def test_splits_and_seeds_do_not_share_people():
    from demo.world.appearance import Identity

    people = [Identity.sample(seed, split) for split in ("train", "val", "test") for seed in (0, 1, 1_000_000)]
    assert len({json.dumps(person.local) for person in people}) == len(people)


def test_identity_survives_json(identity):
    from demo.world.appearance import Identity

    again = Identity.from_dict(json.loads(json.dumps(identity.to_dict())))
    assert np.array_equal(again.head().rest, identity.head().rest)


def test_shards_have_the_documented_arrays_and_a_run_resumes(tmp_path, monkeypatch, capsys):
    from demo import dataset

    monkeypatch.setattr(dataset, "CLIPS_PER_SHARD", 2)
    dataset.render_dataset(tmp_path, clips=4, frames=5, size=32, split="test")
    paths = dataset.shard_paths(tmp_path)
    assert [path.name for path in paths] == ["shard-00000.npz", "shard-00001.npz"]
    shard = dataset.load_shard(paths[0])
    assert shard["frames"].shape == shard["normals"].shape == (2, 5, 32, 32, 3) and shard["frames"].dtype == np.uint8
    assert shard["twin_frames"].shape == (2, 5, 32, 32, 3) and shard["twin_coefficients"].shape == (2, 5, 52)
    assert shard["portrait"].shape == (2, 32, 32, 3) and shard["coefficients"].shape == (2, 5, 52)
    assert shard["rotation"].shape == (2, 5, 3, 3) and shard["translation"].shape == (2, 5, 3)
    assert shard["K"].shape == (2, 5, 3, 3) and shard["c2w"].dtype == np.float64
    assert shard["portrait_c2w"].shape == (2, 4, 4) and shard["portrait_coefficients"].shape == (2, 52)
    before = paths[0].stat().st_mtime_ns
    lost = dataset.load_shard(paths[1])
    paths[1].unlink()
    capsys.readouterr()
    dataset.render_dataset(tmp_path, clips=4, frames=5, size=32, split="test")
    assert "1 of 2 shards are there" in capsys.readouterr().out
    assert paths[0].stat().st_mtime_ns == before
    assert np.array_equal(lost["frames"], dataset.load_shard(paths[1])["frames"])
    assert len(list(dataset.iterate_clips(tmp_path))) == 4
    assert not list(tmp_path.glob("*.part*"))


def test_a_short_last_shard_is_filled_up(tmp_path, monkeypatch, capsys):
    from demo import dataset

    monkeypatch.setattr(dataset, "CLIPS_PER_SHARD", 2)
    dataset.render_dataset(tmp_path, clips=3, frames=5, size=32)
    first = list(dataset.iterate_clips(tmp_path))
    dataset.render_dataset(tmp_path, clips=4, frames=5, size=32)
    assert "1 of 2 shards are there" in capsys.readouterr().out
    clips = list(dataset.iterate_clips(tmp_path))
    assert len(first) == 3 and len(clips) == 4
    assert all(np.array_equal(a["frames"], b["frames"]) for a, b in zip(first, clips, strict=False))
    dataset.render_dataset(tmp_path, clips=1, frames=5, size=32)
    assert "1 of 1 shards are there" in capsys.readouterr().out and len(list(dataset.iterate_clips(tmp_path))) == 4


def test_another_configuration_is_refused(tmp_path):
    from demo import dataset

    dataset.render_dataset(tmp_path, clips=0, size=32)
    with pytest.raises(UserError, match="choose another --out"):
        dataset.render_dataset(tmp_path, clips=0, size=48)
    (tmp_path / "shard-00000.npz").touch()
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="no .*dataset.json"):  # of which split these are, nobody knows
        dataset.render_dataset(tmp_path, clips=0, size=32)


def test_a_damaged_shard_is_named_and_rendered_again(tmp_path):
    from demo import dataset

    for content in (b"", b"PK\x03\x04 and no more"):
        (tmp_path / "shard-00000.npz").write_bytes(content)
        assert dataset.clips_in(tmp_path / "shard-00000.npz") == 0
        with pytest.raises(UserError, match="shard-00000.npz; .*damaged"):
            list(dataset.iterate_clips(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clips", "0"], "--clips; expected 1 or more; found 0"),
        (["--seed", "-1"], "--seed; expected 0 or more"),
        (["--workers", "0"], "--workers; expected 1 or more"),
        (["--frames", "5"], "--frames; expected 4n + 1, at least 9"),
        (["--frames", "30"], "--frames; expected 4n + 1"),
        (["--size", "100"], "--size; expected a multiple of 8"),
        (["--size", "0"], "--size; expected a multiple of 8"),
        (["--out", "file"], "--out file; expected a folder"),
        (["--out", "damaged"], "damaged/dataset.json; expected what python -m demo.dataset writes; found a damaged file"),
        (["--out", "listed"], "listed/dataset.json; expected what python -m demo.dataset writes; found a damaged file"),
        (["--out", "other"], "--out other; expected clips of"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    from demo import dataset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    settings = {"frames": 29, "size": 64, "seed": 0, "split": "test", "clips_per_shard": 16}
    for name, text in (("damaged", "{"), ("listed", "[]"), ("other", json.dumps(settings))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["demo.dataset", "--out", "new", "--clips", "1", *arguments])
    assert run_command("demo.dataset", dataset.main) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out and not (tmp_path / "new").exists()


def test_the_command_ends_without_a_traceback(tmp_path):
    """`python -m demo.dataset` as the user types it."""
    command = [sys.executable, "-m", "demo.dataset", "--out", str(tmp_path), "--clips", "0"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("demo.dataset: error: --clips") and done.stderr.count("\n") == 1


def test_twins_differ_in_expression_alone():
    from demo.dataset import KINDS, make_clip, make_twin

    clip = next(clip for index in range(20) if (clip := make_clip("test", 0, index, 5, 48))["kind"] != KINDS.index("orbit"))
    changed = (np.abs(clip["twin_frames"].astype(int) - clip["frames"]) > 8).any(-1)
    assert 0 < changed.mean() < 0.3  # a face, not the hair, the shoulders and what is behind
    still = make_twin({**clip, "kind": np.int8(KINDS.index("orbit"))}, "test", 0, 1)
    assert np.ptp(still["twin_coefficients"], axis=0).max() == 0


def test_render_clip_repeats_a_shard(tmp_path):
    from demo.dataset import make_clip, render_clip
    from demo.world.appearance import Identity, Scene

    clip = make_clip("test", 0, 2, 5, 32)
    identity = Identity.from_dict(json.loads(clip["identity"]))
    scene = Scene.from_dict(json.loads(clip["scene"]))
    values = [clip[name] for name in ("coefficients", "rotation", "translation", "K", "c2w")]
    frames, normals = render_clip(identity, *values, scene=scene, height=32, width=32)
    assert np.abs(frames.astype(int) - clip["frames"]).mean() < 0.05  # poses are stored as float32
    assert np.abs(normals.astype(int) - clip["normals"]).mean() < 0.05
