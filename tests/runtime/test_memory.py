"""A stream may run for ever: memory stays where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np

from factorportrait.runtime.media.writer import VideoWriter

# fp-run itself, in a process of its own whose memory is nobody else's: video and mesh in, normals rendered, video out. Only the
# writer is watched: after every frame the resident size is noted.
SCRIPT = """
import json, sys
from factorportrait.runtime.cli import main
from factorportrait.runtime.media import writer

sizes = []
write = writer.VideoWriter.write

def watched(self, frame):
    write(self, frame)
    with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]) * 4096)

writer.VideoWriter.write = watched
code = main(sys.argv[1:])
print(json.dumps(sizes))
sys.exit(code)
"""


def write_driving(folder, num_frames: int) -> None:
    """A clip folder: a small video, and a turning tetrahedron as mesh."""
    folder.mkdir()
    y, x = np.mgrid[0:64, 0:64]
    with VideoWriter(folder / "video.mp4", 64, 64, Fraction(25)) as writer:
        for i in range(num_frames):
            writer.write(np.stack([(x * 3 + i) % 256, (y * 2 + 2 * i) % 256, (x + y) % 256], -1).astype(np.uint8))
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.06
    turns = np.linspace(0, 40, num_frames)
    cosine, sine = np.cos(turns), np.sin(turns)
    zero, one = np.zeros(num_frames), np.ones(num_frames)
    rotations = np.array([[cosine, zero, sine], [zero, one, zero], [-sine, zero, cosine]]).transpose(2, 0, 1)
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.int32)
    np.savez(folder / "mesh.npz", vertices=(corners @ rotations.transpose(0, 2, 1)).astype(np.float32), faces=faces)


def test_memory_is_flat_over_2001_frames(tiny_bundle, inputs, tmp_path):
    """Peak of the last quarter within 2 % of the second quarter's."""
    write_driving(tmp_path / "driving", 2001)
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tiny_bundle),
        "--portrait",
        str(inputs / "portrait.png"),
        "--engine",
        "onnxruntime-cpu",
        "--threads",
        "1",
    ]
    command += ["--driving", str(tmp_path / "driving"), "--steps", "1", "--output", str(tmp_path / "out.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 2001
    second, last = max(sizes[500:1000]), max(sizes[1500:])
    assert last <= 1.02 * second, f"{second / 2**20:.1f} MiB in the second quarter, {last / 2**20:.1f} MiB in the last"
