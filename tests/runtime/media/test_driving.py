import csv
import math
import shutil
import subprocess
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import frontal, index_of, one_line, ramp_frames, sphere, write_obj_sequence, write_video
from PIL import Image

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.errors import MediaError
from factorportrait.runtime.media.driving import (
    FrameFolder,
    VideoSource,
    head_rotation,
    open_driving,
    parse_fps,
    read_arkit_csv,
)
from factorportrait.runtime.media.mesh import open_mesh
from factorportrait.runtime.media.portrait import load_portrait

RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001)]


def indices(source):
    return [index_of(frame) for frame in source]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
@pytest.mark.parametrize("fps", RATES)
def test_constant_rate_is_exact(tmp_path, fps, suffix):
    if suffix == ".avi" and fps.denominator != 1:
        pytest.skip("one format of each kind is enough")
    source = VideoSource(write_video(tmp_path / f"v{suffix}", ramp_frames(20), fps))
    assert source.fps == fps and source.is_constant and not source.has_sound
    assert (source.num_frames, source.height, source.width) == (20, 48, 64)
    assert indices(source) == list(range(20)) == indices(source)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(RATES), st.sampled_from([Fraction(12), Fraction(24), Fraction(25), Fraction(30), Fraction(60)]))
def test_resampling_shows_the_last_frame_that_is_due(tmp_path_factory, own, fps):
    path = tmp_path_factory.mktemp("r") / "v.mp4"
    source = VideoSource(write_video(path, ramp_frames(15), own), fps)
    found = indices(source)
    assert source.fps == fps and len(found) == source.num_frames == math.ceil(15 / own * fps)
    assert found == [min(14, math.floor(k / fps * own + Fraction(1, 1000))) for k in range(len(found))]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate(tmp_path, suffix):
    times = [0.0, 0.040, 0.080, 0.200, 0.210, 0.240, 0.280, 0.320, 0.360]
    path = write_video(tmp_path / f"v{suffix}", ramp_frames(9), times=times)
    source = VideoSource(path, Fraction(25))
    assert not source.is_constant
    # at 0.12 and 0.16 s nothing new has come; frame 4 (0.21 s) is shown at no multiple of 0.04 s before frame 5
    assert indices(source)[:10] == [0, 1, 2, 2, 2, 3, 5, 6, 7, 8]
    assert source.num_frames == len(list(source))
    own = VideoSource(path)
    assert own.fps == pytest.approx(8 / 0.36, rel=0.05)


def test_file_that_begins_late(tmp_path):
    path = write_video(tmp_path / "v.mkv", ramp_frames(5), times=[5 + i / 25 for i in range(5)])
    source = VideoSource(path)
    assert source.fps == 25 and indices(source) == list(range(5)) and source.start_s == 5


@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation"
)
@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_rotation(tmp_path, rotation, corner):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255  # top left
    source = VideoSource(write_video(tmp_path / "v.mp4", [frame] * 3, rotation=rotation))
    upright = next(iter(source))
    shape = (32, 64) if rotation in (0, 180) else (64, 32)
    assert upright.shape[:2] == shape == (source.height, source.width)
    row, column = (4 if c == 0 else size - 4 for c, size in zip(corner, shape, strict=True))
    assert upright[row, column].min() > 240 and upright[shape[0] - row, shape[1] - column].max() < 15


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_matrix"), reason="this PyAV writes no matrix")
def test_mirrored_display_matrix_agrees_with_ffmpeg(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg to compare with")
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = [255, 0, 0]
    frame[16:, :32] = [0, 255, 0]
    for rotation, hflip, vflip in [(90, True, False), (0, True, False), (0, False, True), (90, False, True)]:
        path = tmp_path / "v.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            stream.set_display_rotation(rotation, hflip=hflip, vflip=vflip)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode(None))
        subprocess.run(
            ["ffmpeg", "-v", "error", "-y", "-i", str(path), "-frames:v", "1", str(tmp_path / "f.png")], check=True
        )
        expected = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
        assert np.abs(next(iter(VideoSource(path))).astype(int) - expected).max() < 12


def test_square_pixels(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg to set an aspect ratio")
    write_video(tmp_path / "a.mp4", ramp_frames(3))
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.mp4"), "-vf", "setsar=2", str(tmp_path / "b.mp4")], check=True
    )
    assert next(iter(VideoSource(tmp_path / "b.mp4"))).shape == (48, 128, 3)


def test_memory_does_not_grow_with_the_video(tmp_path):
    peaks = []
    for count in (20, 120):
        source = VideoSource(write_video(tmp_path / f"{count}.mp4", ramp_frames(count, 96, 128)))
        tracemalloc.start()
        for _ in source:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * 96 * 128 * 3


def test_sound_is_noticed(tmp_path):
    clip = open_driving(write_video(tmp_path / "v.mp4", ramp_frames(10), sound_s=0.6))
    assert clip.video.has_sound and clip.sound == tmp_path / "v.mp4"
    assert (clip.fps, clip.num_frames) == (25, 10)


def test_unusable_videos(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", ramp_frames(25, 96, 128))
    front = write_video(tmp_path / "front.mp4", ramp_frames(25, 96, 128), options={"movflags": "faststart"})
    matroska = write_video(tmp_path / "whole.mkv", ramp_frames(25, 96, 128))
    half = {path: path.read_bytes()[: path.stat().st_size * 2 // 3] for path in (whole, front, matroska)}
    (tmp_path / "tail.mp4").write_bytes(half[whole])
    (tmp_path / "cut.mp4").write_bytes(half[front])
    (tmp_path / "cut.mkv").write_bytes(half[matroska])
    (tmp_path / "text.mp4").write_text("hello " * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        stream.layout, frame.sample_rate = "mono", 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cases = {
        "tail.mp4": "whole",
        "cut.mp4": "cut short",
        "cut.mkv": "cut short",
        "text.mp4": "not readable as a video",
        "empty.mp4": "not readable as a video",
        "sound.mp4": "sound only",
        "missing.mp4": "no such file",
    }
    for name, words in cases.items():
        with pytest.raises(MediaError) as error:
            list(open_driving(tmp_path / name).video)
        one_line(error.value, words, name)
    with pytest.raises(MediaError) as error:
        VideoSource(whole, Fraction(0))
    one_line(error.value, "above 0")


def test_frame_folder(tmp_path):
    for i, frame in enumerate(ramp_frames(11)):
        Image.fromarray(frame).save(tmp_path / f"f{i}.png")
    (tmp_path / "notes.txt").write_text("x")
    clip = open_driving(tmp_path)
    assert isinstance(clip.video, FrameFolder) and clip.fps is None and clip.num_frames == 11
    assert indices(clip.video) == list(range(11))
    assert open_driving(tmp_path, Fraction(24)).fps == 24
    Image.new("RGB", (10, 10)).save(tmp_path / "f4.png")
    with pytest.raises(MediaError) as error:
        open_driving(tmp_path)
    one_line(error.value, "f4.png", "64x48", "10x10")


def test_clip_folder(tmp_path):
    with pytest.raises(MediaError) as error:
        open_driving(tmp_path)
    one_line(error.value, "an empty folder")
    write_video(tmp_path / "normals.mp4", ramp_frames(8))
    with pytest.raises(MediaError) as error:
        open_driving(tmp_path)
    one_line(error.value, "cameras.json")
    (tmp_path / "cameras.json").write_text("{}")
    clip = open_driving(tmp_path)
    assert (clip.fps, clip.num_frames, clip.video) == (25, 8, None) and clip.normals and clip.cameras
    write_video(tmp_path / "video.mp4", ramp_frames(6), Fraction(24), sound_s=0.3)
    (tmp_path / "mesh").mkdir()
    clip = open_driving(tmp_path)
    assert (clip.fps, clip.num_frames, clip.sound) == (24, 6, tmp_path / "video.mp4") and clip.mesh == tmp_path / "mesh"
    write_csv(tmp_path / "coefficients.csv", [row(i) for i in range(60)])
    clip = open_driving(tmp_path)
    # The table is the expression, so it decides the length, not the video beside it.
    assert clip.coefficients.fps == 24 and clip.coefficients.num_frames == clip.num_frames == 24
    assert clip.sound == tmp_path / "video.mp4" and clip.video.num_frames == 6
    (tmp_path / "mesh.npz").write_bytes(b"")
    assert open_driving(tmp_path).mesh.name == "mesh.npz"
    assert open_driving(tmp_path / "mesh.npz").mesh == tmp_path / "mesh.npz"


def test_obj_files(tmp_path):
    write_obj_sequence(tmp_path / "objs", 3)
    assert open_driving(tmp_path / "objs").mesh == tmp_path / "objs"
    assert open_driving(tmp_path / "objs" / "m0.obj").mesh == tmp_path / "objs" / "m0.obj"
    assert open_driving(tmp_path / "objs", Fraction(30)).fps == 30
    # A texture beside the meshes is no frame; a clip folder may have one mesh.obj.
    Image.new("RGB", (8, 8)).save(tmp_path / "objs" / "skin.png")
    clip = open_driving(tmp_path / "objs")
    assert (clip.mesh, clip.video) == (tmp_path / "objs", None)
    (tmp_path / "clip").mkdir()
    shutil.copy(tmp_path / "objs" / "m0.obj", tmp_path / "clip" / "mesh.obj")
    write_video(tmp_path / "clip" / "video.mp4", ramp_frames(4))
    clip = open_driving(tmp_path / "clip")
    assert clip.mesh == tmp_path / "clip" / "mesh.obj" and clip.video.num_frames == 4


HEADER = [
    "Timecode",
    "BlendshapeCount",
    *(name[0].upper() + name[1:] for name in ARKIT_NAMES),
    "HeadYaw",
    "HeadPitch",
    "HeadRoll",
]


def row(frame, fps=60, value=None, angles=(0.1, 0.2, 0.3)):
    seconds, ff = divmod(frame, fps)
    code = f"10:59:{seconds % 60:02d}:{ff:02d}.{frame % 7:03d}"
    return [code, "61", *([value if value is not None else frame / 1000] * 52), *angles]


def write_csv(path, rows, header=HEADER):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_names():
    assert len(ARKIT_NAMES) == len(set(ARKIT_NAMES)) == 52
    assert ARKIT_NAMES[0] == "eyeBlinkLeft" and ARKIT_NAMES[17] == "jawOpen" and ARKIT_NAMES[-1] == "tongueOut"


@pytest.mark.parametrize("fps", [24, 30, 60])
def test_csv_rate_from_timecode(tmp_path, fps):
    table = read_arkit_csv(write_csv(tmp_path / "a.csv", [row(i, fps) for i in range(2 * fps)]))
    assert table.fps == fps and table.num_frames == 2 * fps and table.num_clamped == 0
    assert table.coefficients.dtype == np.float32 and table.coefficients.shape == (2 * fps, 52)
    assert table.coefficients[:, 7] == pytest.approx(np.arange(2 * fps) / 1000, abs=1e-6)
    assert next(iter(table)).shape == (52,)


def test_csv_dropped_rows_and_resampling(tmp_path):
    rows = [row(i) for i in range(120) if i not in (10, 11, 50)]
    table = read_arkit_csv(write_csv(tmp_path / "a.csv", rows))
    expected = np.arange(120)
    expected[[10, 11, 50]] = [9, 9, 49]
    assert np.rint(table.coefficients[:, 0] * 1000).tolist() == expected.tolist()
    half = read_arkit_csv(tmp_path / "a.csv", Fraction(30))
    assert half.fps == 30 and half.num_frames == 60
    assert np.abs(np.rint(half.coefficients[:, 0] * 1000) - expected[::2]).max() <= 1


def test_csv_names_in_any_case_and_order_without_timecode_or_angles(tmp_path):
    names = [name.lower() if i % 2 else name for i, name in enumerate(reversed(ARKIT_NAMES))]
    table = read_arkit_csv(write_csv(tmp_path / "a.csv", [[i / 100 for i in range(52)]] * 5, names))
    assert table.head_rotation is None and table.fps == 60 and table.num_frames == 5
    assert table.coefficients[0] == pytest.approx([(51 - i) / 100 for i in range(52)], abs=1e-6)


def test_csv_clamps_and_says_so(tmp_path, caplog):
    rows = [row(i, value=0.5) for i in range(3)]
    rows[1][5], rows[2][6] = 1.25, -0.01
    table = read_arkit_csv(write_csv(tmp_path / "a.csv", rows))
    assert table.num_clamped == 2 and table.coefficients.max() == 1 and table.coefficients.min() == 0
    assert "2 values" in caplog.text


def test_csv_refusals(tmp_path):
    header = ["JawOpne" if name == "JawOpen" else name for name in HEADER]
    bad_cell, bad_angle, bad_code, back = row(0), row(0, angles=(30, 0, 0)), row(0), [row(5), row(4)]
    bad_cell[3], bad_code[0] = "nan", "1.5s"
    cases = [
        ([row(0)], header, ["jawOpen", "JawOpne"]),
        ([row(0)[:10]], HEADER[:10], ["and", "more"]),
        ([bad_cell], HEADER, ["row 1", "EyeLookDownLeft", "nan"]),
        ([row(0)[:30]], HEADER, ["row 1", "nothing"]),
        ([bad_angle], HEADER, ["radians", "30"]),
        ([bad_code], HEADER, ["Timecode", "HH:MM:SS:FF"]),
        (back, HEADER, ["row 2", "forward"]),
        ([], HEADER, ["at least one row"]),
    ]
    for rows, names, words in cases:
        with pytest.raises(MediaError) as error:
            read_arkit_csv(write_csv(tmp_path / "a.csv", rows, names))
        one_line(error.value, "a.csv", *words)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x81" * 9)
    for name, words in (("b.csv", "UTF-8"), ("c.csv", "no such file")):
        with pytest.raises(MediaError) as error:
            read_arkit_csv(tmp_path / name)
        one_line(error.value, words)


def test_csv_over_midnight(tmp_path):
    rows = [["23:59:59:58.0", *row(0)[1:]], ["23:59:59:59.0", *row(1)[1:]], ["00:00:00:00.0", *row(2)[1:]]]
    table = read_arkit_csv(write_csv(tmp_path / "a.csv", rows))
    assert table.fps == 60 and table.num_frames == 3


def test_head_angles_turn_the_face_the_stated_way():
    nose, top = np.array([0, 0, 1]), np.array([0, 1, 0])
    yaw, pitch, roll = (head_rotation(*np.eye(3)[i][:, None] * 0.3)[0] for i in range(3))
    assert (yaw @ nose)[0] > 0.2  # to the subject's left
    assert (pitch @ nose)[1] < -0.2  # down
    assert (roll @ top)[0] < -0.2  # to the subject's right shoulder
    turn = head_rotation([0.4], [0.2], [-0.3])[0]
    assert turn @ turn.T == pytest.approx(np.eye(3)) and np.linalg.det(turn) == pytest.approx(1)
    assert turn[:, 2] == pytest.approx([np.sin(0.4) * np.cos(0.2), -np.sin(0.2), np.cos(0.4) * np.cos(0.2)])
    assert frontal().shape == (4, 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (24, 24), (24.0, 24), ("25", 25), (29.97, Fraction(30000, 1001)), ("23.976", Fraction(24000, 1001)), (12.5, 12.5),
        ("29.97", Fraction(30000, 1001)), (" 25 ", 25), ("25.", 25), (".5", Fraction(1, 2)), ("1000", 1000),
        ("23.976023976023978", Fraction(24000, 1001)), (Fraction(2997, 100), Fraction(2997, 100)),
        ("30000/1001", Fraction(30000, 1001)), (Fraction(23), 23), (59.94, Fraction(60000, 1001)), (14.985, Fraction(2997, 200)),
    ],
)  # fmt: skip
def test_parse_fps(value, expected):
    assert parse_fps(value) == expected


def test_parse_fps_refusals():
    texts = ["x", "1/0", "25/0", "abc", "0", "-3", "nan", "1e9", "", "25\n30", "0/5", "1001", "1_0", "30000/1001/2"]
    # Rounded to a rate that a container can hold this is 0; this takes hours to compute; this is no line to print.
    texts += ["0.0001", "1e999999999", "1e-999999999", "9" * 5000]
    for value in (0, -1, float("nan"), float("inf"), 5000, None, Fraction(1, 10**6), *texts):
        with pytest.raises(MediaError) as error:
            parse_fps(value)
        one_line(error.value, "frame rate", "--fps", "above 0", "30000/1001")
        assert len(str(error.value)) < 200


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["v.mp4", "v.mkv", "p.png", "p.jpg", "m.npz", "a.csv"]), st.randoms(use_true_random=False))
def test_damaged_files_raise_only_one_line_errors(damaged_originals, name, random):
    """Bytes overwritten or cut anywhere: either it still reads, or it is a MediaError."""
    data = bytearray((damaged_originals / name).read_bytes())
    for _ in range(random.randint(1, 30)):
        data[random.randrange(len(data))] = random.randrange(256)
    if random.random() < 0.3:
        del data[random.randrange(len(data)) :]
    path = damaged_originals / f"damaged_{name}"
    path.write_bytes(bytes(data))
    try:
        if name.startswith("p"):
            load_portrait(path, 64, 64)
        elif name.startswith("m"):
            list(open_mesh(path))
        elif name.startswith("a"):
            read_arkit_csv(path)
        else:
            list(VideoSource(path))
    except MediaError as error:
        one_line(error, path.name)


@pytest.fixture(scope="module")
def damaged_originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("v.mp4", "v.mkv"):
        write_video(folder / name, ramp_frames(8), sound_s=0.2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    noise.save(folder / "p.png")
    noise.save(folder / "p.jpg")
    vertices, faces = sphere(6, 6)
    np.savez_compressed(folder / "m.npz", vertices=np.stack([vertices] * 3), faces=faces)
    write_csv(folder / "a.csv", [row(i) for i in range(3)])
    return folder
