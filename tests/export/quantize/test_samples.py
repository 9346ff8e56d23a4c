"""Recording: real inputs, bounded, resumable, and refused with a clear line when they do not fit."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_clips import tiny_clip

from factorportrait.bundle import Bundle, FileEntry
from factorportrait.errors import UserError
from factorportrait.export.quantize import samples as recording
from factorportrait.export.quantize.build import _recorded
from factorportrait.export.quantize.clips import media_clips
from factorportrait.export.quantize.samples import RecordSettings, Samples, check_sample, record_samples
from factorportrait.files import sha256_file
from factorportrait.shipped import shipped_checkpoint

SETTINGS = RecordSettings(per_stage=4)


def test_samples_are_what_the_pipeline_met(samples, graphs, fp32):
    recorded = _recorded(samples, graphs)
    # Reference, steps and commit differ in their time embedding; a cache in use is not zero.
    timesteps = {sample["temb"].tobytes() for sample in recorded["dit"]}
    assert len(timesteps) >= 3
    assert any(np.abs(sample["past_k.0"]).max(initial=0) > 0 for sample in recorded["dit"])
    assert any(np.abs(sample["cache_in.0"]).max() > 0 for sample in recorded["vae_decode_steady"])
    assert {len(found) <= 8 for found in recorded.values()} == {True}
    # No stage is without samples but those of other drivings and caches.
    assert {stage for stage, found in recorded.items() if not found} == {"arkit_encoder", "dit_inplace"}


def test_recording_goes_on_where_it_was_interrupted(fp32, clips, tmp_path, monkeypatch):
    generated = []
    real = recording._generate

    def interrupted(opened, recorder, clip, seed):
        if generated:
            raise KeyboardInterrupt
        generated.append(clip.name)
        real(opened, recorder, clip, seed)

    monkeypatch.setattr(recording, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_samples(fp32, clips, tmp_path, SETTINGS, threads=1)
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    monkeypatch.setattr(recording, "_generate", real)
    found = record_samples(fp32, clips, tmp_path, SETTINGS, threads=1)
    assert len(found.files) == 2 and found.files[0].stat().st_mtime_ns == written
    monkeypatch.setattr(recording, "_generate", None)
    assert record_samples(fp32, clips, tmp_path, SETTINGS).key == found.key


def test_other_clips_are_another_recording(clips):
    assert clips[0].digest() != clips[1].digest()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda array: array[..., :-1], r"float32 \["),
        (lambda array: array.astype(np.float64), "float64"),
        (lambda array: np.full_like(array, np.nan), "not-a-number"),
    ],
)
def test_a_sample_that_does_not_fit_names_stage_and_tensor(fp32, recorded, change, found):
    sample = dict(recorded["dit"][0])
    sample["condition_tokens"] = change(sample["condition_tokens"])
    with pytest.raises(UserError, match="stage dit: tensor condition_tokens") as caught:
        check_sample(fp32.stage("dit"), sample)
    assert caught.match(found)


def test_sizes_of_one_name_have_to_agree(fp32, recorded):
    sample = dict(recorded["dit"][0])
    sample["temb"] = np.concatenate([sample["temb"]] * 2, axis=1)
    with pytest.raises(UserError, match="tensor temb"):
        check_sample(fp32.stage("dit"), sample)


def test_damaged_and_empty_recordings(fp32, samples, tmp_path):
    with pytest.raises(UserError, match="found none"):
        Samples(fp32, tmp_path)
    (tmp_path / "000.npz").write_bytes(samples.files[0].read_bytes()[:1000])
    with pytest.raises(UserError, match="a whole .npz"):
        Samples(fp32, tmp_path).of("dit")


def test_no_clips(fp32, tmp_path):
    with pytest.raises(UserError, match="at least one clip"):
        record_samples(fp32, [], tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        media_clips(fp32, tmp_path / "nowhere", 9)
    (tmp_path / "person").mkdir()
    with pytest.raises(UserError, match="one portrait"):
        media_clips(fp32, tmp_path, 9)


def with_head(bundle, folder):
    """The bundle with a head to pose, as a checkpoint with head.npz has it."""
    shutil.copytree(bundle.path, folder)
    shutil.copyfile(shipped_checkpoint() / "head.npz", folder / "head.npz")
    entry = FileEntry(sha256_file(folder / "head.npz"), (folder / "head.npz").stat().st_size)
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, "head.npz": entry})
    (folder / "manifest.json").write_text(manifest.to_json())
    return Bundle(folder)


def test_a_users_clips_are_read_as_fp_run_reads_them(fp32, tmp_path):
    pytest.importorskip("warp")
    bundle, clip = with_head(fp32, tmp_path / "bundle"), tiny_clip(fp32.config, 5)
    person = tmp_path / "clips" / "person"
    (person / "driving").mkdir(parents=True)
    Image.fromarray(clip.portrait).resize((80, 80)).save(person / "portrait.png")
    for i, frame in enumerate(clip.driving):
        Image.fromarray(frame.image).resize((80, 80)).save(person / "driving" / f"{i:03}.png")
    found = media_clips(bundle, tmp_path / "clips", 4)
    assert [one.name for one in found] == ["person"] and len(found[0].driving) == 4
    assert found[0].portrait.shape == clip.portrait.shape and found[0].truth is None
