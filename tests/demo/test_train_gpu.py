"""demo/train_gpu.sh: what it calls is found where the package is not installed. Nothing is rendered or trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# An interpreter that does not read .pth files, and so knows of no editable install. Modules say what they can do, and no more.
PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then
    exec "{python}" -S -m "$2" --help
fi
exec "{python}" -S "$@"
"""


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("bash", "flock", "setsid")), reason="the script needs them")
def test_the_package_need_not_be_installed(tmp_path):
    """The real script; numpy, torch and Warp are on PYTHONPATH, as on a machine that has only these."""
    python, state, libraries = tmp_path / "python", tmp_path / "state", tmp_path / "libraries"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "factorportrait" not in path.name:
            (libraries / path.name).symlink_to(path)
    (state / "data" / "train").mkdir(parents=True)
    for shard in range(os.cpu_count()):  # so that it does not wait for the first ones
        (state / "data" / "train" / f"shard-{shard:05d}.npz").touch()
    (state / "work").mkdir()
    (state / "work" / "vae.jsonl").write_text("{}\n")
    settings = {"PYTHON": str(python), "STATE": str(state), "OUT": str(tmp_path / "out"), "PYTHONPATH": str(libraries)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | settings
    missing = subprocess.run([str(python), "-c", "import factorportrait.export"], env=environment, capture_output=True, cwd=ROOT)
    assert missing.returncode, "an installed package proves nothing"
    done = subprocess.run(["bash", str(ROOT / "demo" / "train_gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m demo.train" in done.stdout
    assert (tmp_path / "out" / "curves.jsonl").read_text() == "{}\n"
