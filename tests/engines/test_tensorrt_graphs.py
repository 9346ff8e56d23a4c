"""Every graph for TensorRT, of the demo's config and of two blocks at Wan-1.3B's real widths, becomes a plan.

Weights are random: whether a graph compiles depends on its types and sizes. Needs `import tensorrt`; the build-only one compiles
without a GPU. Minutes, not seconds: most of them go by in torch's exporter, so each graph is exported once for all precisions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import randomise
from plan_bundles import MACHINE, write_bundle

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.config import VAEConfig
from factorportrait.engines.tensorrt.build import get_plan, requests_of
from factorportrait.engines.tensorrt.plans import Options, PlanStore
from factorportrait.errors import UserError
from factorportrait.export.check import Cases
from factorportrait.export.graphs import WeightFiles, tensor_specs, write_graph
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.quantize.bundles import int8_graph
from factorportrait.export.quantize.recipe import Activation, Activations, Recipe, make_recipe, named_layers
from factorportrait.export.stages import stages_of
from factorportrait.export.variants import FAMILIES, Context, graph_variants
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
STAGES = {
    "vae_encode_first", "vae_encode_steady", "vae_decode_first", "vae_decode_steady", "expression_encoder", "arkit_encoder",
    "expression_controller", "condition_embed", "time_embed", "dit", "dit_inplace",
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The fp16 bundle for TensorRT of a config, as `fp-export` writes it but for the comparison with torch."""

    name: str
    bundle: Bundle

    def graphs(self) -> Iterator[tuple[str, ir.Model]]:
        for name, spec in self.bundle.manifest.stages.items():
            yield name, ir.load(self.bundle.file(spec.file))


def write(graphs: Iterator[tuple[str, ir.Model]], config: ModelConfig, folder: Path) -> Bundle:
    folder.mkdir(parents=True)
    specs, weights = [], {}
    for stage, graph in graphs:
        family = FAMILIES.get(stage, stage)
        weights.setdefault(family, WeightFiles(folder, family))
        file, *data = write_graph(graph, folder, stage, weights[family])
        specs.append(StageSpec(stage, file, tensor_specs(graph.graph.inputs), tensor_specs(graph.graph.outputs), data=tuple(data)))
    return Bundle(write_bundle(folder, tuple(specs), config=config))


@pytest.fixture(scope="module", params=["demo", "wan"])
def exported(request, tmp_path_factory) -> Exported:
    config = WAN if request.param == "wan" else ModelConfig.from_dict(json.loads(DEMO.read_text()))
    model = FactorPortrait(config).eval().requires_grad_(False)
    randomise(model)
    context = Context(model, Cases(model).longest)

    def graphs() -> Iterator[tuple[str, ir.Model]]:
        for stage in stages_of(model):
            (variant,) = graph_variants(stage, "fp16", ("tensorrt",), context)
            yield stage.name, variant.graph

    return Exported(request.param, write(graphs(), config, tmp_path_factory.mktemp(request.param) / "fp16"))


def drawn_recipe(exported: Exported) -> Recipe:
    """What the reviewed table makes of activations that nobody has measured."""
    generator = np.random.default_rng(0)
    seen = Activations({}, {})
    paths = {name: exported.bundle.file(spec.file) for name, spec in exported.bundle.manifest.stages.items()}
    for stage, graph in exported.graphs():
        for name, layer in named_layers(stage, graph).items():
            for side, axis in ((seen.inputs, 1 - layer.axis), (seen.results, layer.axis)):
                side[name] = Activation()
                side[name].add(generator.standard_normal((8, layer.shape[axis]), np.float32), layer.kind)
    return make_recipe(paths, seen, exported.bundle.config.dit.num_layers)


def compile_all(bundle: Bundle, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of the plan of each stage, and why the others have none."""
    store, sizes, refused = PlanStore(folder), {}, {}
    for request in requests_of(bundle, HERE, Options()):
        try:
            plan, _ = get_plan(store, request, notice=lambda line: None)
            sizes[request.spec.name] = plan.bytes
        except UserError as error:
            refused[request.spec.name] = str(error)
    return sizes, refused


def test_fp16(exported, tmp_path):
    profiles = {
        request.spec.name: [profile.name for profile in request.profiles]
        for request in requests_of(exported.bundle, HERE, Options())
    }
    assert profiles["dit"] == ["stream", "clip"] and profiles["dit_inplace"] == ["stream"]
    assert profiles["vae_decode_steady"] == []
    sizes, refused = compile_all(exported.bundle, tmp_path / "plans")
    assert refused == {} and set(sizes) == STAGES


def test_int8(exported, tmp_path):
    recipe = drawn_recipe(exported)
    assert sum(layer.mode == "int8" for layer in recipe.layers.values()) > 6 * exported.bundle.config.dit.num_layers
    graphs = ((stage, int8_graph(stage, graph, recipe, "tensorrt")) for stage, graph in exported.graphs())
    bundle = write(graphs, exported.bundle.config, tmp_path / "int8")
    pairs = sum(node.op_type == "QuantizeLinear" for node in ir.load(bundle.file("dit.onnx")).graph)
    assert pairs >= 4 * bundle.config.dit.num_layers
    sizes, refused = compile_all(bundle, tmp_path / "plans")
    assert refused == {} and set(sizes) == STAGES
