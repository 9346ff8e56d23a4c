"""Every graph for TensorRT, of the demo's config and of two blocks at Wan-1.3B's real widths, becomes a plan.

Weights are random: whether a graph compiles depends on its types and sizes. Needs `import tensorrt`; the build-only one compiles
without a GPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomise
from plan_bundles import MACHINE, write_bundle

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.config import VAEConfig
from factorportrait.engines.tensorrt.build import get_plan, requests_of
from factorportrait.engines.tensorrt.plans import Options, PlanStore
from factorportrait.errors import UserError
from factorportrait.model_config import DiTConfig, GenerationConfig, ModelConfig

tensorrt = pytest.importorskip("tensorrt", reason="no TensorRT here, so no graph is compiled", exc_type=ImportError)
HERE = replace(MACHINE, tensorrt=tensorrt.__version__)
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint" / "config.json"
# Wan 2.1 T2V-1.3B and its VAE, with two of its thirty blocks.
WAN = ModelConfig(
    system="factorportrait", name="wan-1.3b-two-blocks", height=512, width=512, fps=25.0,
    vae=VAEConfig(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True)),
    dit=DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2),
    generation=GenerationConfig(chunk_frames=3, window_frames=9, max_clip_frames=21),
)  # fmt: skip


def export(config: ModelConfig, precision: str, folder: Path) -> Bundle:
    """Every stage's graph for TensorRT. Not by `build_bundle`, which would compare each with torch."""
    from factorportrait.export.graphs import WeightFiles, tensor_specs, write_graph
    from factorportrait.export.models.factorportrait import FactorPortrait
    from factorportrait.export.stages import stages_of
    from factorportrait.export.variants import FAMILIES, Context, graph_variants

    folder.mkdir(parents=True)
    with torch.no_grad():
        model = FactorPortrait(config).eval().requires_grad_(False)
        randomise(model)
    context, specs = Context(model), []
    for stage in stages_of(model):
        (variant,) = graph_variants(stage, precision, ("tensorrt",), context)
        tensors = tensor_specs(variant.graph.graph.inputs), tensor_specs(variant.graph.graph.outputs)
        weights = WeightFiles(folder, FAMILIES.get(stage.name, stage.name))
        file, *data = write_graph(variant.graph, folder, stage.name, weights)
        specs.append(StageSpec(stage.name, file, *tensors, data=tuple(data)))
    return Bundle(write_bundle(folder, tuple(specs), config=config))


@pytest.mark.parametrize("precision", ["fp16"])
@pytest.mark.parametrize("name", ["demo", "wan"])
def test_every_graph_compiles(name, precision, tmp_path):
    config = WAN if name == "wan" else ModelConfig.from_dict(json.loads(DEMO.read_text()))
    bundle = export(config, precision, tmp_path / "bundle")
    store, refused, uses = PlanStore(tmp_path / "plans"), {}, {}
    for request in requests_of(bundle, HERE, Options()):
        stage = request.spec.name
        uses[stage] = [profile.name for profile in request.profiles]
        try:
            plan, _ = get_plan(store, request, notice=lambda line: None)
            assert plan.bytes > 0
        except UserError as error:
            refused[stage] = str(error)
    assert refused == {}
    assert uses["dit"] == ["stream", "clip"] and uses["dit_inplace"] == ["stream"]
    vae = {f"vae_{direction}_{part}" for direction in ("encode", "decode") for part in ("first", "steady")}
    assert vae | {"expression_encoder", "arkit_encoder", "expression_controller", "condition_embed", "time_embed"} <= set(uses)
