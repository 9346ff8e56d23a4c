"""A released checkpoint -> bundle: what it takes is told first, then one graph after another is written and checked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from factorportrait.bundle import (
    CONSTANTS,
    EMBED_BIAS,
    EMBED_WEIGHT,
    MANIFEST,
    NEGATIVE_PROMPT,
    NEUTRAL_CODE,
    PROMPT,
    Bundle,
    FileEntry,
    Manifest,
)
from factorportrait.checkpoint_files import HEAD
from factorportrait.embeddings import read_embeddings
from factorportrait.errors import UserError
from factorportrait.export.build import (
    WRITERS,
    BuildReport,
    Progress,
    bundle_with,
    check_head,
    check_output,
    check_precision,
    digest_of,
    report_of,
    source_digests,
    version_of,
    write_arrays,
    write_graphs,
)
from factorportrait.export.check import threshold
from factorportrait.export.models.taehv import open_tiny_decoder
from factorportrait.export.parts import (
    DrawnCases,
    LazyTransformer,
    ReleasedModel,
    block_ranges,
    parts_of,
    with_capacity,
)
from factorportrait.export.precision import HalfWeights
from factorportrait.export.stages import OPSET
from factorportrait.export.variants import Context
from factorportrait.export.weights.assemble import draw_expression
from factorportrait.export.weights.encoders import image_encoder_bytes, open_image_encoder, prompt_embeddings
from factorportrait.export.weights.estimate import ExportPlan, check_memory, check_room, plan_export
from factorportrait.export.weights.files import open_weights
from factorportrait.export.weights.networks import build_vae
from factorportrait.export.weights.released import Options, Released, open_released
from factorportrait.files import sha256_file, whole_folder
from factorportrait.model_config import TEXT_TOKENS

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8-weights": 1, "fp8": 1}


def export_released(
    path: str | Path,
    output: str | Path,
    options: Options,
    *,
    precision: str = "fp32",
    targets: tuple[str, ...] | None = None,
    force: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> BuildReport:
    """Export a released checkpoint; see `build_bundle`, which does it for ours.

    Args:
        on_note: is given lines for the user before anything is written: what was found, what is new, and what the export takes.

    Raises:
        CheckpointError: see `open_released`.
        UserError: a precision that is not offered here, or too little disk or memory.
        GraphsRefused: a graph is further from torch than its precision may be.
    """
    started = time.perf_counter()
    path, output = Path(path), Path(output)
    targets = check_precision(precision, targets)
    if precision not in WEIGHT_BYTES:
        raise UserError(
            f"--precision {precision}", expected=f"{', '.join(WEIGHT_BYTES)} for a released checkpoint", found=precision,
            action="calibration needs a model that is trained for these inputs: take fp16 or int8-weights",
        )  # fmt: skip
    check_output(output)
    versions = {name: version_of(name) for name in WRITERS}
    version_of("safetensors")
    released = open_released(path, options)
    check_head(path / HEAD)
    notes, plan = list(released.notes), plan_of(released, precision)
    for note in (*notes, f"plan: {plan}"):
        on_note(note)
    if force or not output.exists():
        check_room(plan, output)  # before gigabytes are read for their digests, unless an older bundle may be found up to date
    files = _digests(path, released.files)
    asked = {
        "precision": precision, "targets": targets, "config": released.config.to_dict(), "blocks": options.blocks_per_graph,
        "loras": [scale for _, scale in options.loras], "tiny": options.decoder is not None, "prompt": options.prompt is not None,
        "negative": options.negative is not None,
    }  # fmt: skip
    key = digest_of({"checkpoint": files, "options": asked, "sources": source_digests(), "versions": versions})
    if not force and (old := bundle_with(output, key)) is not None:
        return report_of(old, True, started)

    check_room(plan, output)
    _check_text_encoder(released)
    on_progress(Progress(0, 1, "", "load"))
    arrays, declared = _constants(released)
    model, undeclared = _load(released)
    for note in (*declared, *undeclared):
        on_note(note)
    notes += [*declared, *undeclared]
    if model.expression is not None:
        arrays[NEUTRAL_CODE] = model.expression["controller"].neutral_code.numpy()
    cases = DrawnCases(model)
    context = Context(
        model, cases.longest, in_place=partial(with_capacity, model),
        half=lambda stage: HalfWeights(stage.module).stage(stage),
    )  # fmt: skip
    with whole_folder(output) as folder:
        stages, variants = write_graphs(
            parts_of(model, options.blocks_per_graph), context, cases, folder, precision, targets, False, on_progress,
            replace(threshold(precision), min_headroom=None),
        )  # fmt: skip
        write_arrays(folder / CONSTANTS, arrays)
        if (path / HEAD).is_file():
            shutil.copyfile(path / HEAD, folder / HEAD)
        manifest = Manifest(
            config=released.config, precision=precision, stages=stages, targets=targets, variants=variants, source_key=key,
            files={file.name: FileEntry(sha256_file(file), file.stat().st_size) for file in sorted(folder.iterdir())},
            provenance={
                "checkpoint": released.config.name, "checkpoint_files": files, "opset": OPSET, "notes": notes,
                "plan": asdict(plan), "versions": {"factorportrait": version_of("factorportrait"), **versions},
            },
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return report_of(Bundle(output), False, started)


def plan_of(released: Released, precision: str) -> ExportPlan:
    """What the export of a checkpoint takes."""
    blocks = released.options.blocks_per_graph
    if blocks is None:
        lazy = LazyTransformer(released.config, released.tensors, released.where)
        start, end = block_ranges(lazy, "dit")[0]
        blocks = end - start
    beside = 4 * sum(tensor.nbytes // tensor.dtype.itemsize for tensor in released.vae.tensors.values())
    if released.image_encoder is not None:
        beside += image_encoder_bytes(released.image_encoder)
    return plan_export(released.tensors, WEIGHT_BYTES[precision], blocks, beside)


def _digests(path: Path, files: tuple[Path, ...]) -> dict[str, str]:
    """Digest by name: below the checkpoint, else the file's own, numbered where another one has it."""
    root, found = path if path.is_dir() else path.parent, {}
    for file in files:
        name = unique = str(file.relative_to(root) if file.is_relative_to(root) else file.name)
        if unique in found:
            unique = f"{name} {len(found)}"
        found[unique] = sha256_file(file)
    return found


def _check_text_encoder(released: Released) -> None:
    """Raises UserError unless the text encoder fits, in bfloat16: with 5.7 billion weights it needs more than a small export."""
    if released.text_encoder is not None and released.options.prompt is None:
        weights = open_weights(released.text_encoder.weights).tensors.values()
        needed = 2 * sum(tensor.nbytes // tensor.dtype.itemsize for tensor in weights)
        check_memory(
            "fp-export: the prompts' embeddings", needed, "compute them elsewhere and give --prompt-embeddings FILE"
        )


def _constants(released: Released) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of the bundle, and what the user has to know of them."""
    arrays, notes, config = {}, [], released.config
    bias = released.tensors["patch_embedding.bias"].load().float().numpy()
    if set(config.fusion.streams) == {"noise"}:
        arrays[EMBED_BIAS] = bias
    elif config.system == "factorportrait":
        arrays |= {EMBED_BIAS: bias, EMBED_WEIGHT: released.tensors["patch_embedding.weight"].load().float().numpy()}
    if config.dit.text_dim is None:
        return arrays, notes
    options, encoder, prompts = released.options, released.text_encoder, {}
    for name, file, option in (
        (PROMPT, options.prompt, "--prompt-embeddings"), (NEGATIVE_PROMPT, options.negative, "--negative-embeddings"),
    ):  # fmt: skip
        if file is not None:
            arrays[name] = read_embeddings(file, config.dit.text_dim, TEXT_TOKENS, option)
            notes.append(f"{name.replace('_', ' ')}: embeddings of {file.name}")
    if PROMPT not in arrays and encoder is not None:
        prompts[PROMPT] = released.recipe.prompt
        if NEGATIVE_PROMPT not in arrays and released.recipe.negative_prompt is not None:
            prompts[NEGATIVE_PROMPT] = released.recipe.negative_prompt
        arrays |= zip(prompts, prompt_embeddings(encoder.weights, encoder.tokenizer, list(prompts.values())), strict=True)
        notes += [f"{name.replace('_', ' ')}: {text or 'the empty one'}, by the text encoder" for name, text in prompts.items()]
    if PROMPT not in arrays:
        notes.append("prompt: none in the bundle, for no text encoder with a tokenizer was found: fp-run needs --prompt-embeddings")
    return arrays, notes


def _load(released: Released) -> tuple[ReleasedModel, list[str]]:
    config, options, notes = released.config, released.options, []
    tiny = None
    if options.decoder is not None:
        tiny = open_tiny_decoder(options.decoder, torch.float32)
        own = (tiny.config.z_dim, tiny.config.spatial_stride, tiny.config.temporal_stride)
        wanted = (config.vae.z_dim, config.vae.spatial_stride, config.vae.temporal_stride)
        if own != wanted:
            raise UserError(
                f"--decoder {options.decoder}", expected="latents of {} channels, 1/{} in space and 1/{} in time".format(*wanted),
                found="{}, 1/{} and 1/{}".format(*own), action="take the one for this VAE: taew2_1 or taew2_2",
            )  # fmt: skip
        notes.append(f"decoder: {options.decoder.name} in the place of the VAE's, faster and less sharp")
    picture = None
    if released.image_encoder is not None:
        picture = open_image_encoder(released.image_encoder, config.dit.image_dim)
    elif config.dit.image_dim is not None:
        notes.append("picture encoder: none in the bundle, since none was found: fp-run needs --image-embeddings")
    model = ReleasedModel(
        config, LazyTransformer(config, released.tensors, released.where), build_vae(released.vae, torch.float32),
        draw_expression(config) if config.conditioning.shows_expression else None, picture, tiny,
    )  # fmt: skip
    return model, notes
