"""A stream may run for ever: memory stays where it was."""

from __future__ import annotations

import json
import subprocess
import sys

# Runs in a process of its own, whose memory is nobody else's. Frames are encoded to a file as in fp-run.
SCRIPT = """
import json, sys
from fractions import Fraction
import numpy as np
from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.inputs import default_camera
from factorportrait.runtime.media.writer import VideoWriter
from factorportrait.runtime.session import open_bundle

bundle, output, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
session = open_bundle(bundle, threads=1).session(steps=1)
config = session.config
K, c2w = default_camera(config)

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def driving():
    random = np.random.default_rng(0)
    for _ in range(total):
        normals = random.integers(0, 255, (config.height, config.width, 3), dtype=np.uint8)
        yield DrivingFrame(normals, K, c2w, coefficients=random.random(52, dtype=np.float32))

session.set_reference(np.full((config.height, config.width, 3), 90, np.uint8))
sizes = []
with VideoWriter(output, config.width, config.height, Fraction(25)) as writer:
    for picture in session.frames(driving()):
        writer.write(picture)
        sizes.append(resident_bytes())
print(json.dumps(sizes))
"""


def test_memory_is_flat_over_2001_frames(tiny_bundle, tmp_path):
    """Peak of the last quarter within 2 % of the second quarter's."""
    command = [sys.executable, "-c", SCRIPT, str(tiny_bundle), str(tmp_path / "out.mp4"), "2001"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 2001
    second, last = max(sizes[500:1000]), max(sizes[1500:])
    assert last <= 1.02 * second, f"{second / 2**20:.1f} MiB in the second quarter, {last / 2**20:.1f} MiB in the last"
