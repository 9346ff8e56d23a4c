"""fp-run from the command line: real files in, real videos out, and one line for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from factorportrait.bundle import SCHEMA
from factorportrait.engines.tensorrt.machine import find_gpu
from factorportrait.errors import UserError
from factorportrait.runtime.cli import check_unused, main, parser


def decode(path) -> tuple[np.ndarray, Fraction]:
    """All frames uint8 [T, H, W, 3] and the frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


def arguments(bundle, inputs, output, **changes) -> list[str]:
    """A run that works: shipped portrait and clip, few frames."""
    values = {
        "portrait": inputs / "portrait.png",
        "driving": inputs / "driving_clip",
        "frames": 7,
        "steps": 1,
        "engine": "onnxruntime-cpu",
        "threads": 1,
    } | changes
    command = [str(bundle), "--output", str(output)]
    for name, value in values.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def test_clip_folder_to_video(tiny_bundle, inputs, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    assert main(arguments(tiny_bundle, inputs, output, json=True)) == 0
    frames, fps = decode(output)
    assert frames.shape == (7, 32, 32, 3) and fps == 25
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["frames"] == 7 and report["fps"] == "25"
    assert {"input", "expression", "pose", "step", "commit", "decode", "write"} <= set(report["stage_ms"])
    assert 0 < report["frame_ms_p50"] <= report["frame_ms_p95"]
    assert 0 < report["generate_ms_p50"] <= report["frame_ms_p50"]  # end to end is never less
    assert report["time_to_first_frame_ms"] > 0 and report["peak_memory_bytes"] > 2**20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "clip"},
        {"camera": "orbit:±20"},
        {"camera": "freeze"},
        {"driving": None, "expression_from": "driving.mp4", "pose_from": "driving_clip", "camera": "camera_orbit.json"},
        {"driving": "arkit.csv", "pose_from": "driving_clip", "fps": "25"},
        {"expression_from": "arkit.csv", "guidance": "expression=2,pose=1.5"},
        {"side_by_side": True, "chunk": 1, "window": 2},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_sources_and_modes(tiny_bundle, inputs, tmp_path, changes):
    resolved = {
        name: inputs / value if isinstance(value, str) and (inputs / value).exists() else value
        for name, value in changes.items()
    }
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", **resolved)) == 0
    frames, _ = decode(tmp_path / "out.mp4")
    assert frames.shape == (7, 32, 96 if "side_by_side" in changes else 32, 3)


def test_what_runs_at_once_changes_no_picture(tiny_bundle, inputs, tmp_path, capsys):
    """The default, --throughput and no overlap write the same pictures; --latency begins with a chunk of one latent frame."""
    pictures, reports = {}, {}
    ways = {"default": {}, "throughput": {"throughput": True}, "none": {"overlap": "none"}, "latency": {"latency": True}}
    ways |= {"stages": {"overlap": "stages"}}
    for name, changes in ways.items():
        output = tmp_path / name
        output.mkdir()
        assert main(arguments(tiny_bundle, inputs, output, json=True, frames=31, chunk=2, window=4, **changes)) == 0
        pictures[name] = np.stack([np.asarray(Image.open(file)) for file in sorted(output.iterdir())])
        *_, line, report = capsys.readouterr().out.splitlines()
        reports[name] = json.loads(report)
        # Stages that overlap have no time of their own.
        assert ("of it generating" in line) == (name != "stages")
        assert all((reports[name][key] is None) == (name == "stages") for key in ("generated_fps", "generate_ms_p50"))
    for name in ("default", "throughput", "stages"):
        assert np.array_equal(pictures[name], pictures["none"]), name
    assert pictures["none"].shape == (31, 32, 32, 3) and not np.array_equal(pictures["latency"], pictures["none"])
    assert reports["throughput"]["overlap"] == reports["default"]["overlap"]
    assert reports["latency"]["overlap"] == reports["none"]["overlap"] == "none"
    for name in ("embedding_reason", "overlap_reason", "kv_cache_reason"):
        assert reports["default"][name]
    with pytest.raises(SystemExit, match="2"):
        main(arguments(tiny_bundle, inputs, tmp_path / "o.mp4", latency=True, throughput=True))
    assert "not allowed with" in capsys.readouterr().err


def test_same_command_same_bytes(tiny_bundle, inputs, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        assert main(arguments(tiny_bundle, inputs, tmp_path / name, seed=5)) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_freeze_holds_pose_and_expression(tiny_bundle, inputs, tmp_path):
    """A frozen clip differs from a moving one, and its camera moves."""
    for name, camera in (("frozen", "freeze:30"), ("moving", "orbit:30")):
        assert main(arguments(tiny_bundle, inputs, tmp_path / f"{name}.mp4", camera=camera, frames=9)) == 0
    frozen, moving = (decode(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("frozen", "moving"))
    assert np.abs(frozen - moving).max() > 8
    assert np.abs(frozen[0] - frozen[-1]).max() > 8


def test_driving_shorter_than_a_chunk_is_padded(tiny_bundle, inputs, tmp_path):
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", frames=2)) == 0
    assert len(decode(tmp_path / "out.mp4")[0]) == 2


def test_a_plain_video_needs_a_pose(tiny_bundle, inputs, tmp_path, capsys):
    """This bundle has no head.npz to pose: refused, and said how to bring a pose."""
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", driving=inputs / "driving.mp4")) == 2
    assert "has no pose" in capsys.readouterr().err


def with_head(bundle: Path, inputs: Path, path: Path) -> Path:
    """The bundle with the demo's head.npz."""
    import hashlib

    shutil.copytree(bundle, path)
    head = (inputs / "head.npz").read_bytes()
    (path / "head.npz").write_bytes(head)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["head.npz"] = {"sha256": hashlib.sha256(head).hexdigest(), "bytes": len(head)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_plain_video_with_a_head_to_pose(tiny_bundle, inputs, tmp_path, capsys):
    bundle = with_head(tiny_bundle, inputs, tmp_path / "bundle")
    assert main(arguments(bundle, inputs, tmp_path / "out.mp4", driving=inputs / "driving.mp4")) == 0
    assert "stays still" in capsys.readouterr().out
    assert main(arguments(bundle, inputs, tmp_path / "csv.mp4", driving=inputs / "arkit.csv")) == 0
    assert "head angles" in capsys.readouterr().out


# --- what users get wrong ------------------------------------------------------------------------------------------------------


def break_text_png(folder, inputs):
    (folder / "bad.png").write_text("not a picture")
    return {"portrait": folder / "bad.png"}


def break_truncated_video(folder, inputs):
    data = (inputs / "driving.mp4").read_bytes()
    (folder / "bad.mp4").write_bytes(data[: len(data) // 3])
    return {"driving": folder / "bad.mp4"}


def break_no_frames(folder, inputs):
    (folder / "bad.mp4").write_bytes(b"")
    return {"driving": folder / "bad.mp4"}


def break_faces(folder, inputs):
    with np.load(inputs / "driving_clip" / "mesh.npz") as arrays:
        faces = arrays["faces"].copy()
        faces[0, 0] = 10**6
        np.savez(folder / "mesh.npz", vertices=arrays["vertices"][:4], faces=faces)
    return {"pose_from": folder / "mesh.npz"}


def cameras(folder, inputs, change):
    data = json.loads((inputs / "driving_clip" / "cameras.json").read_text())
    change(data["frames"][1])
    (folder / "cameras.json").write_text(json.dumps(data))
    return {"camera": folder / "cameras.json"}


def break_nan_camera(folder, inputs):
    def change(frame):
        frame["c2w"][0][3] = float("nan")

    return cameras(folder, inputs, change)


def break_singular_camera(folder, inputs):
    def change(frame):
        frame["c2w"][0] = [0.0, 0.0, 0.0, 0.0]

    return cameras(folder, inputs, change)


def break_csv(folder, inputs):
    lines = (inputs / "arkit.csv").read_text().splitlines()
    (folder / "bad.csv").write_text("\n".join(line.rsplit(",", 20)[0] for line in lines))
    return {"expression_from": folder / "bad.csv"}


def break_baked_normals(folder, inputs):
    clip = folder / "clip"
    shutil.copytree(inputs / "driving_clip", clip)
    (clip / "mesh.npz").unlink()
    from factorportrait.runtime.media.mesh import PosedHead
    from factorportrait.runtime.media.normals import NormalRenderer
    from factorportrait.runtime.media.writer import VideoWriter

    head = PosedHead(inputs / "head.npz")
    data = json.loads((clip / "cameras.json").read_text())
    K = np.array([[data["width"] * 3.0, 0, data["width"] / 2], [0, data["width"] * 3.0, data["height"] / 2], [0, 0, 1]])
    c2w = np.diag([1.0, -1, -1, 1])
    c2w[2, 3] = 0.95
    render = NormalRenderer(data["height"], data["width"])
    with VideoWriter(clip / "normals.mp4", data["width"], data["height"], Fraction(25)) as writer:
        for _ in range(8):
            writer.write(render(head.vertices(np.eye(3)), head.faces, K, c2w))
    return {"driving": clip, "camera": "orbit:20"}


BROKEN = {
    "text named png": (break_text_png, "bad.png"),
    "missing portrait": (lambda folder, inputs: {"portrait": folder / "nowhere.jpg"}, "nowhere.jpg"),
    "truncated video": (break_truncated_video, "bad.mp4"),
    "video without frames": (break_no_frames, "bad.mp4"),
    "mesh faces out of range": (break_faces, "mesh.npz"),
    "camera with nan": (break_nan_camera, "frame 1"),
    "camera not invertible": (break_singular_camera, "frame 1"),
    "csv without columns": (break_csv, "bad.csv"),
    "baked normals and another camera": (break_baked_normals, "mesh.npz, which can be seen from anywhere"),
    "unknown camera": (lambda folder, inputs: {"camera": "orbti:20"}, "orbit"),
    "unknown container": (lambda folder, inputs: {"output": folder / "out.xyz"}, "out.xyz"),
    "no such driving": (lambda folder, inputs: {"driving": folder / "none.mp4"}, "none.mp4"),
    "guidance": (lambda folder, inputs: {"guidance": "smile=2"}, "--guidance"),
    "steps": (lambda folder, inputs: {"steps": 0}, "--steps"),
    "shift": (lambda folder, inputs: {"shift": 0}, "--shift; expected more than 0"),
    "window": (lambda folder, inputs: {"window": 99}, "the trained window"),
    "fps that divides by zero": (lambda folder, inputs: {"fps": "25/0"}, "25/0"),
    "fps that is a word": (lambda folder, inputs: {"fps": "fast"}, "fast"),
    "crop": (lambda folder, inputs: {"driving_crop": "1,2,3"}, "1,2,3"),
    "clip too long": (lambda folder, inputs: {"mode": "clip", "frames": 60}, "use --mode stream"),
    "frames that nothing ends": (lambda folder, inputs: {"frames": 0}, "--frames"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_line(tiny_bundle, inputs, tmp_path, capfd, case):
    make, expected = BROKEN[case]
    changes = make(tmp_path, inputs)
    before = sorted(path.name for path in tmp_path.iterdir())
    output = changes.pop("output", tmp_path / "out.mp4")
    assert main(arguments(tiny_bundle, inputs, output, **changes)) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("fp-run: error: ") and "\n" not in error and "Traceback" not in error
    assert expected in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_camera_of_few_digits(tiny_bundle, inputs, tmp_path):
    """A last row that is 0 0 0 1 to within rounding is a camera for the embedding too."""

    def change(frame):
        frame["c2w"][3] = [1e-4, 0.0, -1e-4, 1.0]

    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", **cameras(tmp_path, inputs, change))) == 0


def test_an_embedding_that_nothing_knows(tiny_bundle, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FACTORPORTRAIT_EMBED", "avx9")
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4")) == 2
    assert "error: FACTORPORTRAIT_EMBED; expected auto or numpy" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
    # Where the graph embeds, nobody asks.
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", embedding="graph", frames=1)) == 0


def change_manifest(change):
    def apply(bundle):
        manifest = json.loads((bundle / "manifest.json").read_text())
        change(manifest)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return apply


def flip_a_byte(bundle):
    data = bytearray((bundle / "dit.onnx").read_bytes())
    data[-100] ^= 255
    (bundle / "dit.onnx").write_bytes(data)


BROKEN_BUNDLES = {
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "manifest.json"),
    "missing file": (lambda bundle: (bundle / "dit.onnx").unlink(), "no such file"),
    "truncated file": (lambda bundle: os.truncate(bundle / "dit.onnx", 1000), "found 1000"),
    "changed file": (flip_a_byte, "sha256"),
    "newer schema": (change_manifest(lambda m: m.update(schema=SCHEMA + 1)), "update factorportrait"),
    "unknown config key": (change_manifest(lambda m: m["config"]["dit"].update(num_layer=3)), "num_layers"),
    "path outside": (
        change_manifest(lambda m: m["files"].update({"../x": {"sha256": "0", "bytes": 1}})),
        "inside the bundle",
    ),
    "not json": (lambda bundle: (bundle / "manifest.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("case", BROKEN_BUNDLES)
def test_damaged_bundle_is_one_line(tiny_bundle, inputs, tmp_path, capfd, case):
    damage, expected = BROKEN_BUNDLES[case]
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    damage(bundle)
    assert main(arguments(bundle, inputs, tmp_path / "out.mp4")) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("fp-run: error: ") and "\n" not in error
    assert expected in error
    assert not (tmp_path / "out.mp4").exists()


def test_output_folder_that_is_not_writable(tiny_bundle, inputs, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert main(arguments(tiny_bundle, inputs, tmp_path / "file" / "out.mp4")) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("fp-run: error: ") and "\n" not in error


def limited(bundle, inputs, output, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "factorportrait.runtime.cli", *arguments(bundle, inputs, output, **changes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_full_disk(tiny_bundle, inputs, tmp_path):
    """A file system of 64 KiB; the portrait's pictures do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system here")
    try:
        process = limited(tiny_bundle, inputs, disk / "out.mp4", frames=61, side_by_side=True)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        assert "the disk is full" in error and error.strip().count("\n") == 0
        assert not (disk / "out.mp4").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_interrupt_keeps_what_was_rendered(tiny_bundle, inputs, tmp_path):
    """Ctrl-C in the middle of a long run: code 130, one line, and a file that plays."""
    bundle = with_head(tiny_bundle, inputs, tmp_path / "bundle")
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(4000):  # one picture under many names: a driving that takes long
        if i == 0:
            Image.new("RGB", (64, 64), "gray").save(frames / "0.png")
        else:
            os.link(frames / "0.png", frames / f"{i}.png")
    output = tmp_path / "out.mp4"
    process = limited(bundle, inputs, output, driving=frames, frames=None, steps=4)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size > 4000 for path in tmp_path.glob(".out*.part*")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted" in error and "Traceback" not in error
    pictures, _ = decode(output)
    assert 0 < len(pictures) < 4000
    assert not list(tmp_path.glob(".out*"))


def test_the_sound_of_the_driving_is_kept(tiny_bundle, inputs, tmp_path):
    """One second of tone beside the shipped driving video; the output has it, cut to its own length."""
    source = tmp_path / "driving.mkv"
    pictures, _ = decode(inputs / "driving.mp4")
    with av.open(str(source), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for picture in pictures[:25]:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        tone = np.sin(np.arange(44100) * 2 * np.pi * 440 / 44100).astype(np.float32)
        for start in range(0, 44100 - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    pose = inputs / "driving_clip"
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", driving=source, pose_from=pose, frames=12)) == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        (stream,) = container.streams.audio
        seconds = sum(frame.samples for frame in container.decode(stream)) / stream.rate
        assert 0.4 <= seconds <= 0.56  # 12 frames are 0.48 s; copied sound ends with a whole packet
    assert (
        main(arguments(tiny_bundle, inputs, tmp_path / "quiet.mp4", driving=source, pose_from=pose, no_sound=True)) == 0
    )
    with av.open(str(tmp_path / "quiet.mp4")) as container:
        assert not container.streams.audio


def test_the_engine_and_the_cache_are_told(tiny_bundle, tiny_checkpoint, inputs, tmp_path, capsys):
    """One by itself, one asked for; both render the same pictures to a level."""
    reports = []
    torch = {"engine": "torch", "checkpoint": tiny_checkpoint, "device": "cpu"}
    for i, changes in enumerate(
        ({"engine": None, "threads": None, "chunk": 2, "window": 4}, torch | {"chunk": 2, "window": 5})
    ):
        assert main(arguments(tiny_bundle, inputs, tmp_path / f"{i}.mp4", json=True, **changes)) == 0
        lines = capsys.readouterr().out.splitlines()
        reports.append(json.loads(lines[-1]))
        assert any(line.startswith(f"fp-run: engine {reports[-1]['engine']} (") for line in lines)
    first, second = reports
    assert first["engine"] != "torch" and first["engine_reason"]
    assert (second["engine"], second["engine_reason"], second["device"]) == ("torch", "asked for", "cpu")
    assert (first["kv_cache"], second["kv_cache"]) == ("inplace", "concat")
    assert second["kv_cache_reason"] == "a window of 5 latent frames is no multiple of a chunk of 2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "cuda"}, "--engine; expected auto or tensorrt"),
        ({"engine": "torch"}, "was exported from"),  # the tiny bundle is not of the shipped checkpoint
        ({"cache": "inplace", "chunk": 2, "window": 5}, "--cache inplace; .*no multiple of a chunk of 2; use --cache concat"),
        ({"device": "cpu"}, "--device; expected the engine torch; found onnxruntime-cpu; leave it out"),
        ({"checkpoint": "folder"}, "--checkpoint; expected the engine torch; found onnxruntime-cpu"),
        ({"plans": "folder"}, "--plans; expected the engine tensorrt; found onnxruntime-cpu"),
        ({"engine": "torch", "no_spin": True}, "--no-spin; expected the engine onnxruntime-cpu; found torch"),
        *(
            ({"mode": "clip", name: value}, f"--{name}; expected a stream; found --mode clip; leave it out")
            for name, value in (("cache", "concat"), ("commit", "last-step"), ("chunk", 1), ("window", 2), ("latency", True))
        ),
    ],
)
def test_what_cannot_run_is_one_line(tiny_bundle, inputs, tmp_path, capsys, changes, words):
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", **changes)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(words, lines[0])
    assert not (tmp_path / "out.mp4").exists()


def test_threads_are_the_host_s():
    """Engines on a device take neither a number of threads nor a way for them to wait."""
    for engine in ("tensorrt", "onnxruntime-cuda"):
        for given, option in ((["--threads", "2"], "--threads"), (["--no-spin"], "--no-spin")):
            with pytest.raises(UserError, match=f"{option}; expected the engine onnxruntime-cpu.*; found {engine}; leave it out"):
                check_unused(parser().parse_args(given), engine, "stream")
    check_unused(parser().parse_args(["--plans", "folder"]), "tensorrt", "clip")
    # What is the default anyway says nothing.
    check_unused(parser().parse_args(["--cache", "auto", "--commit", "clean"]), "tensorrt", "clip")


def test_no_gpu_for_tensorrt(tiny_bundle, inputs, tmp_path, capsys):
    gpu = find_gpu()
    if not isinstance(gpu, str):
        pytest.skip("this machine has a GPU")
    assert main(arguments(tiny_bundle, inputs, tmp_path / "out.mp4", engine="tensorrt")) == 2
    assert f"--engine tensorrt; expected an NVIDIA GPU and its driver; found {gpu}" in capsys.readouterr().err
