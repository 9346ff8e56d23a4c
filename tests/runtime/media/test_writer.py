import hashlib
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import index_of, one_line, ramp_frames, read_sound, write_video
from PIL import Image

from factorportrait.errors import MediaError, UserError
from factorportrait.runtime.media.driving import VideoSource
from factorportrait.runtime.media.writer import VideoWriter, compose_side_by_side, contact_sheet

NTSC = Fraction(30000, 1001)


def leftovers(folder):
    return [entry.name for entry in folder.iterdir() if ".part" in entry.name]


def write(path, frames, fps=NTSC, **options):
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, fps, **options) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("fps", [NTSC, Fraction(24), Fraction(23)])
def test_frames_come_back(tmp_path, suffix, fps):
    path = tmp_path / "new" / f"out{suffix}"
    write(path, ramp_frames(26), fps)
    source = VideoSource(path)
    assert source.fps == fps and source.num_frames == 26 and source.start_s == 0
    assert [index_of(frame) for frame in source] == list(range(26))
    assert leftovers(tmp_path / "new") == []
    if suffix == ".mp4":
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_colours_survive(tmp_path, suffix):
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:, :32], frame[:, 32:64], frame[:, 64:] = (200, 40, 30), (30, 180, 60), (40, 50, 210)
    write(tmp_path / f"o{suffix}", [frame] * 4)
    back = next(iter(VideoSource(tmp_path / f"o{suffix}"))).astype(int)
    for column in (16, 48, 80):
        assert np.abs(back[32, column] - frame[32, column]).max() < 10


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_same_frames_give_the_same_bytes(tmp_path, suffix):
    sound = write_video(tmp_path / "s.mp4", ramp_frames(12), sound_s=0.5)
    digests = set()
    for name in ("a", "b"):
        write(tmp_path / f"{name}{suffix}", ramp_frames(12), audio_from=sound)
        digests.add(hashlib.sha256((tmp_path / f"{name}{suffix}").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_odd_sizes_get_one_more_row_and_column(tmp_path, suffix):
    frames = [frame[:47, :63] for frame in ramp_frames(3)]
    write(tmp_path / f"o{suffix}", frames)
    back = next(iter(VideoSource(tmp_path / f"o{suffix}")))
    assert back.shape == (48, 64, 3) and back[-1, -1].mean() == pytest.approx(20, abs=3)


@pytest.mark.parametrize(
    ("suffix", "source_suffix", "codec", "how"),
    [
        (".mp4", ".mp4", "aac", "copied"),
        (".mkv", ".mp4", "aac", "copied"),
        (".mov", ".mov", "pcm_s16le", "copied"),
        (".mp4", ".mov", "pcm_s16le", "encoded"),
        (".webm", ".mp4", "aac", "encoded"),
        (".webm", ".webm", "libopus", "copied"),
        (".mp4", ".mkv", "flac", "encoded"),
    ],
)
def test_sound_is_kept_in_place_and_cut(tmp_path, suffix, source_suffix, codec, how):
    """A click at 0.5 s stays there, and 3 s of sound end with 1 s of video."""
    video_codec = "libvpx-vp9" if source_suffix == ".webm" else "libx264"
    source = tmp_path / f"driving{source_suffix}"
    write_video(source, ramp_frames(25), sound_s=3.0, sound_codec=codec, codec=video_codec)
    writer = write(tmp_path / f"o{suffix}", ramp_frames(25), Fraction(25), audio_from=source)
    assert writer.sound == how
    original, _, first = read_sound(source)
    click = np.abs(original).argmax() / 48000 + first
    samples, rate, start = read_sound(tmp_path / f"o{suffix}")
    assert np.abs(samples).argmax() / rate + start == pytest.approx(click, abs=0.004)
    end = len(samples) / rate + start
    assert 0.95 < end <= 1.0 + 0.03
    video = VideoSource(tmp_path / f"o{suffix}")
    assert video.num_frames == 25 and float(video.start_s) <= 0.01


def test_sound_of_a_video_that_begins_late(tmp_path):
    """The driving file's pictures begin at 0.2 s of its clock: the click at 0.5 s comes 0.3 s into the output."""
    for suffix in (".mkv", ".mp4"):
        times = [0.2 + i / 25 for i in range(20)]
        source = write_video(tmp_path / "late.mkv", ramp_frames(20), times=times, sound_s=1.0)
        assert VideoSource(source).start_s == pytest.approx(0.2)
        write(tmp_path / f"o{suffix}", ramp_frames(20), Fraction(25), audio_from=source)
        samples, rate, start = read_sound(tmp_path / f"o{suffix}")
        assert np.abs(samples).argmax() / rate + start == pytest.approx(0.3, abs=0.03)


def test_no_drift_at_ntsc_rates(tmp_path):
    """After 20 s the last frame is where the exact rate puts it, and the sound is as long as the picture."""
    count = 600
    source = write_video(tmp_path / "d.mp4", ramp_frames(count, 16, 16), NTSC, sound_s=21)
    write(tmp_path / "o.mp4", ramp_frames(count, 16, 16), NTSC, audio_from=source)
    with av.open(str(tmp_path / "o.mp4")) as container:
        stream = container.streams.video[0]
        times = [p.pts * p.time_base for p in container.demux(stream) if p.size]
    assert times == [k / NTSC for k in range(count)]
    samples, rate, start = read_sound(tmp_path / "o.mp4")
    assert len(samples) / rate + start == pytest.approx(count / NTSC, abs=0.05)


def test_ffprobe_agrees(tmp_path):
    if not shutil.which("ffprobe"):
        pytest.skip("no ffprobe")
    source = write_video(tmp_path / "d.mp4", ramp_frames(30), NTSC, sound_s=2)
    write(tmp_path / "o.mp4", ramp_frames(30), NTSC, audio_from=source)
    entries = "stream=codec_name,pix_fmt,r_frame_rate,avg_frame_rate,start_time,nb_read_frames,color_space"
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", entries, "-of", "default=nw=1"]
    lines = subprocess.run(
        [*command, str(tmp_path / "o.mp4")], capture_output=True, text=True, check=True
    ).stdout.split()
    for expected in (
        "codec_name=h264", "pix_fmt=yuv420p", "r_frame_rate=30000/1001", "avg_frame_rate=30000/1001", "color_space=bt709",
        "nb_read_frames=30", "start_time=0.000000", "codec_name=aac",
    ):  # fmt: skip
        assert expected in lines
    check = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "o.mp4"), "-f", "null", "-"]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stderr == ""


def test_folder_of_pictures(tmp_path):
    write(f"{tmp_path}/frames/", ramp_frames(3))
    names = sorted(entry.name for entry in (tmp_path / "frames").iterdir())
    assert names == ["frame_000000.png", "frame_000001.png", "frame_000002.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "frames" / names[2])), ramp_frames(3)[2])
    with pytest.raises(MediaError) as error:
        VideoWriter(f"{tmp_path}/frames/", 64, 48, NTSC)
    one_line(error.value, "empty folder")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["o.mp4", "o.mkv", "o.webm", "o/"])
def test_interrupt_keeps_what_was_rendered(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), VideoWriter(f"{tmp_path}/{name}", 64, 48, NTSC) as writer:
        for frame in ramp_frames(9):
            writer.write(frame)
        raise KeyboardInterrupt
    if name == "o/":
        assert len(list((tmp_path / "o").iterdir())) == 9
    else:
        assert [index_of(frame) for frame in VideoSource(tmp_path / name)] == list(range(9))
    assert leftovers(tmp_path) == []


def test_error_keeps_it_under_another_name_and_an_older_file_stays(tmp_path):
    (tmp_path / "o.mp4").write_text("older")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "o.mp4", 64, 48, NTSC) as writer:
        writer.write(ramp_frames(1)[0])
        raise RuntimeError("stopped")
    assert (tmp_path / "o.mp4").read_text() == "older"
    assert VideoSource(tmp_path / "o.partial.mp4").num_frames == 1
    with pytest.raises(MediaError), VideoWriter(tmp_path / "p.mp4", 64, 48, NTSC) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(MediaError) as error, VideoWriter(tmp_path / "p.mp4", 64, 48, NTSC):
        pass
    one_line(error.value, "at least one frame")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["o.mp4", "o.partial.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_killed_process_leaves_a_playable_part(tmp_path, suffix):
    code = textwrap.dedent(f"""
        import os, numpy as np
        from factorportrait.runtime.media.writer import VideoWriter
        writer = VideoWriter({str(tmp_path / ("o" + suffix))!r}, 64, 48, 25)
        rng = np.random.default_rng(0)
        for i in range(200):
            writer.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        os._exit(9)
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (part,) = leftovers(tmp_path)
    assert not (tmp_path / f"o{suffix}").exists()
    with av.open(str(tmp_path / part)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 50


def test_memory_is_flat(tmp_path):
    frame = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    peaks = []
    for count in (20, 200):
        tracemalloc.start()
        write(tmp_path / "o.mp4", [frame] * count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * frame.nbytes


def limited(folder, suffix, num_frames, limit):
    """Run a writer in a process whose files may not grow over `limit` bytes: the kernel refuses as for a full disk."""
    code = textwrap.dedent(f"""
        import numpy as np
        from factorportrait.errors import UserError
        from factorportrait.runtime.media.writer import VideoWriter
        rng = np.random.default_rng(0)
        try:
            with VideoWriter({str(folder) + "/o" + suffix!r}, 256, 256, 25) as writer:
                for i in range({num_frames}):
                    writer.write(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8))
        except UserError as error:
            print(str(error))
    """)

    def limit_files():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit_files)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", "/"])
def test_file_size_limit(tmp_path, suffix):
    message = limited(tmp_path, suffix, 30, 100_000)
    assert message.count("\n") == 1 and "cannot write" in message and "--output" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(("suffix", "num_frames"), [(".mp4", 60), (".mkv", 60), (".mp4", 1)])
def test_full_disk(tmp_path, suffix, num_frames):
    disk = tmp_path / "disk"
    disk.mkdir()
    # One frame of noise takes about 43 kB: its part file fits, the final copy beside it does not.
    size = "1m" if num_frames > 1 else "64k"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        message = limited(disk, suffix, num_frames, 0)
        assert message.count("\n") == 1 and "the disk is full" in message
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("x")
    silent = write_video(tmp_path / "silent.mp4", ramp_frames(2))
    cases = [
        ("o.avi", {}, ".mp4"),
        ("o.gif", {}, ".webm"),
        ("o", {}, "folder of pictures"),
        ("o.mp4", {"audio_from": silent}, "an audio stream"),
        ("o.mp4", {"audio_from": tmp_path / "none.wav"}, "no such file"),
        ("o.mp4", {"audio_from": tmp_path / "file"}, "decoded"),
        ("file/o.mp4", {}, "cannot write"),
    ]
    for name, options, words in cases:
        with pytest.raises(UserError) as error:
            VideoWriter(tmp_path / name, 64, 48, NTSC, **options)
        one_line(error.value, words)
    with pytest.raises(MediaError) as error:
        VideoWriter(tmp_path / "o.mp4", 64, 48, Fraction(0))
    one_line(error.value, "above 0")
    assert leftovers(tmp_path) == []


def test_unwritable_folder(tmp_path):
    if os.geteuid() == 0:
        with pytest.raises(UserError) as error:
            VideoWriter("/proc/o.mp4", 64, 48, NTSC)
        one_line(error.value, "cannot write /proc/o.mp4")
        return
    tmp_path.chmod(0o500)
    with pytest.raises(UserError) as error:
        VideoWriter(tmp_path / "o.mp4", 64, 48, NTSC)
    one_line(error.value, "no permission")


def test_without_x264(tmp_path, monkeypatch, caplog):
    real = av.codec.Codec

    def without(name, mode="r"):
        if name == "libx264":
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", without)
    write(tmp_path / "o.mp4", ramp_frames(26))
    assert "MPEG-4 part 2" in caplog.text
    assert [index_of(frame) for frame in VideoSource(tmp_path / "o.mp4")] == list(range(26))


def test_side_by_side():
    reference, driving = np.full((50, 40, 3), 10, np.uint8), np.full((200, 100, 3), 20, np.uint8)
    output = np.full((100, 101, 3), 30, np.uint8)
    picture = compose_side_by_side(reference, driving, output)
    assert picture.shape == (100, 303, 3)
    # 80 of 101 columns, 50 of 101 columns, all: the rest are black bars of equal width.
    row = picture[50, :, 0]
    assert [(row == value).sum() for value in (10, 20, 30, 0)] == [80, 50, 101, 72]
    assert [int(row[i]) for i in (9, 10, 89, 90, 125, 126, 175, 176, 202)] == [0, 10, 10, 0, 0, 20, 20, 0, 30]


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 96), (48, 48), (33, 50)])
def test_side_by_side_of_a_square_face_crop(tmp_path, height, width):
    """The panels of any format are as wide as the output, so the writer's width is known beforehand; circles stay round."""
    yy, xx = np.mgrid[:224, :224] - 111.5
    disk = np.where((yy**2 + xx**2 < 100**2)[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=-1)
    output = np.full((height, width, 3), 30, np.uint8)
    picture = compose_side_by_side(output, disk, output)
    assert picture.shape == (height, 3 * width, 3)
    middle = picture[:, width : 2 * width, 0] > 127
    assert middle.any(0).sum() == pytest.approx(middle.any(1).sum(), abs=1)
    assert middle.any(0).sum() == pytest.approx(min(height, width) * 200 / 224, abs=2)
    with VideoWriter(tmp_path / "o.mp4", 3 * width, height, NTSC) as writer:
        writer.write(picture)


def test_what_was_kept_is_part_of_the_one_error(tmp_path, caplog):
    """A clip that breaks in the middle of a run: one line says what is wrong and what is left of the run."""
    problem = MediaError(
        "video d.mp4 is damaged after frame 3", expected="9 frames", found="3", action="export it again"
    )
    with (
        pytest.raises(MediaError) as error,
        VideoWriter(tmp_path / "o.mp4", 64, 48, NTSC) as writer,
    ):
        for frame in ramp_frames(3):
            writer.write(frame)
        raise problem
    assert error.value is problem
    one_line(error.value, "damaged after frame 3", "export it again", "the first 3 frames are kept in", "o.partial.mp4")
    assert str(error.value).count("frames are kept in") == 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert VideoSource(tmp_path / "o.partial.mp4").num_frames == 3


def test_what_could_not_be_kept_is_part_of_the_one_error(tmp_path, caplog):
    (tmp_path / "o.partial.mp4").mkdir()
    with pytest.raises(MediaError) as error, VideoWriter(tmp_path / "o.mp4", 64, 48, NTSC) as writer:
        writer.write(ramp_frames(1)[0])
        raise MediaError("video d.mp4 is damaged", action="export it again")
    one_line(error.value, "damaged", "could not be kept", "cannot write")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_contact_sheet():
    sheet = contact_sheet(ramp_frames(5), 3)
    assert sheet.shape == (96, 192, 3) and sheet[50, 0, 0] == 20 + 24 and sheet[-1, -1].max() == 0
    with pytest.raises(MediaError) as error:
        contact_sheet([], 3)
    one_line(error.value, "contact sheet")
