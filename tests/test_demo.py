"""The shipped demo: its checkpoint, its inputs, and every graph against torch on what a real run feeds it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from factorportrait.bundle import Bundle
from factorportrait.engines.ort import OrtEngine
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


class RecordingRunner:
    """A real runner that keeps copies of what it was fed: the first calls, and those that look back on a full window."""

    def __init__(self, runner, kept: list):
        self.spec, self._runner, self._kept = runner.spec, runner, kept

    def run(self, inputs, outputs=None):
        self._kept.append({name: np.array(array) for name, array in inputs.items()})
        if len(self._kept) > CASES_PER_STAGE:
            del self._kept[CASES_PER_STAGE - 2]  # the first ones and the last one stay
        return self._runner.run(inputs, outputs)


class RecordingEngine(OrtEngine):
    """ONNX Runtime with a recorder before every stage."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.kept = defaultdict(list)

    def load(self, spec):
        return RecordingRunner(super().load(spec), self.kept[spec.name])


@pytest.fixture(scope="module")
def real_inputs(demo_bundle):
    """Per stage what two short runs on the shipped files feed it: the mesh clip in stream mode, the ARKit table in clip mode."""
    engine, config, inputs = RecordingEngine(demo_bundle), demo_bundle.config, shipped_inputs()
    opened = OpenBundle(demo_bundle, engine)
    portrait = load_portrait(inputs / "portrait.png", config.height, config.width)
    for driving, mode, num_frames in (("driving_clip", "stream", 29), ("arkit.csv", "clip", 9)):
        session = opened.session(mode=mode, steps=2)
        session.set_reference(portrait)
        pictures = list(session.frames(open_inputs(demo_bundle, inputs / driving, num_frames=num_frames)))
        assert len(pictures) == num_frames
    return engine.kept


@pytest.mark.parametrize("name", STAGES)
def test_every_graph_equals_torch_on_real_inputs(demo_bundle, real_inputs, name):
    model = load_checkpoint(shipped_checkpoint())
    stage = next(stage for stage in stages_of(model) if stage.name == name)
    runner = OrtEngine(demo_bundle).load(demo_bundle.stage(name))
    assert real_inputs[name]
    for case in real_inputs[name]:
        with torch.no_grad():
            expected = stage.module(*(torch.from_numpy(case[tensor]) for tensor in stage.input_names))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        found = runner.run(case)
        for output, tensor in zip(stage.output_names, expected, strict=True):
            assert relative_error(found[output], tensor.numpy())[1] <= 1e-4, output


def test_shipped_weights_are_small_and_described():
    folder = shipped_checkpoint()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size <= 32 * 2**20
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8").lower()
    for topic in ("data", "recipe", "seed", "hardware", "metrics", "limits", "rendered"):
        assert topic in card, topic
