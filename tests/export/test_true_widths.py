"""Every system at its true widths, two blocks deep: the commands from a folder to a video, each in a process of its own.

What the numbers are is the other tests' matter; these show that names, sizes, memory and files of a real release go through.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from factorportrait.bundle import Bundle
from factorportrait.export.weights.networks import PUBLISHED
from factorportrait.export.weights.synthetic import RELEASES

INPUTS = Path(__file__).parents[2] / "demo" / "inputs"
LAYERS, FRAMES, SIZE = 2, 13, 64


def command(module: str, *arguments: object) -> None:
    """Run a command of the package; what it says is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"factorportrait.{module}", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{module}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture
def folder(tmp_path):
    """Gigabytes, which pytest would keep for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_folder_to_video(name, folder):
    checkpoint, path, video = folder / "checkpoint", folder / "bundle", folder / "out.mp4"
    command("export.weights.synthetic", name, checkpoint, "--layers", LAYERS)
    prompt = ["--prompt-embeddings", checkpoint / "prompt.npy"] if (checkpoint / "prompt.npy").is_file() else []
    command("export.cli", checkpoint, "--size", f"{SIZE}x{SIZE}", "--output", path, *prompt)
    known, bundle = PUBLISHED[RELEASES[name].network].dit, Bundle(path)
    found = bundle.config.dit
    assert (found.dim, found.ffn_dim, found.num_heads, found.num_layers) == (known.dim, known.ffn_dim, known.num_heads, LAYERS)
    assert (found.text_dim, found.image_dim, bundle.config.vae) == (known.text_dim, known.image_dim, RELEASES[name].vae)
    assert all(stage.check["num_cases"] > 0 for stage in bundle.manifest.stages.values())
    command(
        "runtime.cli", path, "--portrait", INPUTS / "portrait.png", "--driving", INPUTS / "driving_clip", "--frames", FRAMES,
        "--steps", 2, "--output", video,
    )  # fmt: skip
    with av.open(str(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.std() > 5
