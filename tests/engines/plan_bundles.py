"""Bundles and machines for tests of plans. Test files of this folder import it as `plan_bundles`."""

from __future__ import annotations

from pathlib import Path

from helpers import TINY

from factorportrait.bundle import MANIFEST, FileEntry, Manifest, StageSpec, TensorSpec
from factorportrait.engines.tensorrt.machine import Machine
from factorportrait.files import sha256_file
from factorportrait.model_config import ModelConfig

MACHINE = Machine("11.4.0.106", "NVIDIA Test 1", "8.9", "linux-x86_64")
ENCODER = StageSpec(
    "arkit_encoder", "arkit_encoder.onnx", (TensorSpec("coefficients", "float32", ("B", 52)),),
    (TensorSpec("code", "float32", ("B", 16)),),
)  # fmt: skip
CONTROLLER = StageSpec(
    "expression_controller", "expression_controller.onnx", (TensorSpec("codes", "float32", (1, "4*N", 16)),),
    (TensorSpec("expression_modulation", "float32", (1, "N", 6, 64)),),
)  # fmt: skip
DIT = StageSpec(
    "dit", "dit.onnx",
    (
        TensorSpec("noise_latents", "float32", (1, 16, "F", 4, 4)), TensorSpec("condition_tokens", "float16", (1, "F", 4, 64)),
        TensorSpec("positions", "int64", ("F",)), TensorSpec("past_positions", "int64", ("P",)),
        TensorSpec("past_k.0", "float16", (1, "P", 4, 64)), TensorSpec("past_v.0", "float16", (1, "P", 4, 64)),
    ),
    (TensorSpec("velocity", "float32", (1, 16, "F", 4, 4)),),
)  # fmt: skip
DIT_IN_PLACE = StageSpec(
    "dit_inplace", "dit_inplace.onnx",
    (
        TensorSpec("noise_latents", "float32", (1, 16, "F", 4, 4)), TensorSpec("cache_k.0", "float16", (1, 1, "4*S", 64)),
        TensorSpec("key_positions", "int64", ("S",)), TensorSpec("write_index", "int64", (1,)),
    ),
    (TensorSpec("velocity", "float32", (1, 16, "F", 4, 4)),),
)  # fmt: skip
DECODER = StageSpec(
    "vae_decode_first", "vae_decode_first.onnx", (TensorSpec("latents", "float32", (1, 16, 1, 4, 4)),),
    (TensorSpec("frames", "float32", (1, 3, 1, 32, 32)),),
)  # fmt: skip


def write_bundle(
    folder: Path, specs: tuple[StageSpec, ...], targets: tuple[str, ...] = ("tensorrt",), config: ModelConfig | None = None
) -> Path:
    """A bundle of these stages. A file that is not in the folder yet gets a few bytes, which is enough for a store of plans."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name for spec in specs for name in spec.files}
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_bytes(name.encode())
    files = {name: FileEntry(sha256_file(folder / name), (folder / name).stat().st_size) for name in names}
    manifest = Manifest(
        config=config or ModelConfig.from_dict(TINY), precision="fp16", stages={spec.name: spec for spec in specs}, files=files,
        provenance={}, source_key="", targets=targets,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder
