"""The shipped demo: its checkpoint, its inputs, and every graph against torch on what a real run feeds it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from factorportrait.bundle import Bundle
from factorportrait.engines.base import run_once
from factorportrait.engines.ort import OrtEngine
from factorportrait.engines.recording import RecordingEngine
from factorportrait.export.build import build_bundle
from factorportrait.export.check import relative_error
from factorportrait.export.checkpoint import load_checkpoint
from factorportrait.export.stages import stages_of
from factorportrait.runtime.inputs import open_inputs
from factorportrait.runtime.media.portrait import load_portrait
from factorportrait.runtime.session import STAGES, OpenBundle
from factorportrait.shipped import shipped_checkpoint, shipped_inputs

CASES_PER_STAGE = 5


@pytest.fixture(scope="module")
def demo_bundle(request):
    """The demo's fp32 bundle, kept in pytest's cache and exported only when something changed."""
    path = request.config.cache.mkdir("factorportrait") / "demo-fp32"
    build_bundle(shipped_checkpoint(), path)
    return Bundle(path)


def recorder(kept):
    """Keeps copies of what every stage is fed: the first calls, and those that look back on a full window."""

    def show(name, inputs):
        kept[name].append({tensor: np.array(array) for tensor, array in inputs.items()})
        if len(kept[name]) > CASES_PER_STAGE:
            del kept[name][CASES_PER_STAGE - 2]  # the first ones and the last one stay

    return show


@pytest.fixture(scope="module")
def real_inputs(demo_bundle):
    """Per stage what two short runs on the shipped files feed it: the mesh clip in stream mode, the ARKit table in clip mode."""
    kept, config, inputs = defaultdict(list), demo_bundle.config, shipped_inputs()
    engine = RecordingEngine(OrtEngine(demo_bundle), recorder(kept))
    opened = OpenBundle(demo_bundle, engine)
    portrait = load_portrait(inputs / "portrait.png", config.height, config.width)
    for driving, mode, num_frames in (("driving_clip", "stream", 29), ("arkit.csv", "clip", 9)):
        session = opened.session(mode=mode, steps=2, cache="concat", embedding="graph")
        session.set_reference(portrait)
        pictures = list(session.frames(open_inputs(demo_bundle, inputs / driving, num_frames=num_frames)))
        assert len(pictures) == num_frames
    return kept


@pytest.mark.parametrize("name", [*STAGES, "dit"])
def test_every_graph_equals_torch_on_real_inputs(demo_bundle, real_inputs, name):
    model = load_checkpoint(shipped_checkpoint())
    stage = next(stage for stage in stages_of(model) if stage.name == name)
    engine = OrtEngine(demo_bundle)
    assert real_inputs[name]
    for case in real_inputs[name]:
        with torch.no_grad():
            expected = stage.module(*(torch.from_numpy(case[tensor]) for tensor in stage.input_names))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        found = run_once(engine, name, case)
        for output, tensor in zip(stage.output_names, expected, strict=True):
            assert relative_error(found[output], tensor.numpy())[1] <= 1e-4, output


def test_shipped_weights_are_small_and_described():
    folder = shipped_checkpoint()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size <= 32 * 2**20
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8").lower()
    for topic in ("data", "recipe", "seed", "hardware", "metrics", "limits", "rendered"):
        assert topic in card, topic


def test_stages_of_a_chunk_sum_to_its_time(demo_bundle):
    """Serial: the named stages explain 98 % of a chunk's wall time and never more than all of it, `other` left out."""
    from factorportrait.benchmarks.cases import Case, resolve
    from factorportrait.benchmarks.peers.loop import LoopSubject
    from factorportrait.benchmarks.schema import OTHER

    case = resolve(Case("demo", bundle="demo", mode="stream", steps=2, frames=45, threads=1), demo_bundle.config)
    chunks = LoopSubject(case, OpenBundle(demo_bundle, OrtEngine(demo_bundle, threads=1))).repeat(case.frames).chunks
    shares = [1 - chunk.stage_ms[OTHER] / chunk.wall_ms for chunk in chunks if chunk.steady]
    sums = [sum(chunk.stage_ms.values()) / chunk.wall_ms for chunk in chunks]
    assert len(shares) >= 2 and sums == pytest.approx([1] * len(chunks), abs=0.02), "stages overlap"
    # Another process may take the processor between two stages of one chunk, hardly of all.
    assert max(shares) >= 0.98
