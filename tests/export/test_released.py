"""Released checkpoints from folder to video: fp-export and fp-run on every system, and the pictures against independent code.

The checkpoints are synthetic, in their published layouts, of width 128. What a run computes is recomputed with diffusers' networks
where it has them (T2V and its VAE, Animate), else with the torch modules that `test_wan_vs_diffusers.py` compares with it; the
order of things around them (slots, masks, timesteps, which latents go where) is written out here again.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from wan_models import diffusers_transformer, diffusers_vae, embed_nothing, embed_reference

from factorportrait.benchmarks.cases import Case, materialise
from factorportrait.bundle import NEGATIVE_PROMPT, PROMPT, Bundle, stage_parts
from factorportrait.errors import CheckpointError, UserError
from factorportrait.export import released, variants
from factorportrait.export.build import write_arrays
from factorportrait.export.cli import main as fp_export
from factorportrait.export.parts import (
    EXAMPLE_SIZES,
    DrawnCases,
    LazyTransformer,
    ReleasedModel,
    transformer_stage,
    with_capacity,
)
from factorportrait.export.released import _digests
from factorportrait.export.weights import estimate, synthetic
from factorportrait.export.weights.files import open_weights
from factorportrait.export.weights.networks import PUBLISHED, open_transformer
from factorportrait.export.weights.released import Options, open_released, parse_lora, recipes
from factorportrait.export.weights.synthetic import RELEASES, write_release
from factorportrait.files import sha256_file
from factorportrait.model_config import TEXT_TOKENS
from factorportrait.runtime.cli import main as fp_run
from factorportrait.runtime.inputs import open_inputs
from factorportrait.runtime.media.camera import ray_maps
from factorportrait.runtime.media.portrait import load_portrait
from factorportrait.runtime.schedule import FACTORS, NoiseSource, flow_schedule, parse_guidance
from factorportrait.runtime.session import open_bundle
from factorportrait.runtime.wan import wan_guidance
from factorportrait.systems import SYSTEMS as SYSTEM_TABLE

INPUTS = Path(__file__).parents[2] / "demo" / "inputs"
SYSTEMS = {
    "t2v-1.3b": "factorportrait", "fun-control": "wan-fun-control", "fun-camera": "wan-fun-camera", "self-forcing": "self-forcing",
    "animate-14b": "wan-animate",
}  # fmt: skip
SLOW = [name for name in RELEASES if name not in SYSTEMS]
# Exported block by block, where it matters most: blocks with adapters, and a cache in place. The others are one graph.
CUT = ("animate-14b", "self-forcing")
# Those whose authors sample with guidance.
GUIDED = ("fun-control", "fun-camera")
FRAMES, STEPS, SIZE = 13, 2, 64
TOLERANCE = 2  # of 255: the last rounding, and a float's noise before it


@pytest.fixture(scope="module", autouse=True)
def shared_vae_graphs():
    """All checkpoints here have one VAE; its graphs are exported once, and checked against torch in every bundle."""
    kept, export = {}, variants.export_stage

    def export_once(stage):
        if not stage.name.startswith("vae_"):
            return export(stage)
        key = stage.name, tuple((name, float(tensor.double().sum())) for name, tensor in stage.module.state_dict().items())
        if key not in kept:
            kept[key] = export(stage)
        return kept[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "export_stage", export_once)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> checkpoint and bundle, made when first asked for."""
    made = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint, bundle = folder / "checkpoint", folder / "bundle"
            write_release(name, checkpoint, tiny=True, layers=2 if name in CUT else 1)
            command = [str(checkpoint), "--size", f"{SIZE}x{SIZE}", "--output", str(bundle)]
            command += ["--blocks-per-graph", "1"] if name in CUT else []
            if (checkpoint / "prompt.npy").is_file():
                command += ["--prompt-embeddings", str(checkpoint / "prompt.npy")]
            assert fp_export(command) == 0
            made[name] = checkpoint, bundle
        return made[name]

    return make


def run(bundle: Path, output: Path, **changes) -> int:
    values = {"portrait": INPUTS / "portrait.png", "driving": INPUTS / "driving_clip", "frames": FRAMES, "steps": STEPS} | changes
    command = [str(bundle), "--output", str(output), "--engine", "onnxruntime-cpu", "--threads", "1"]
    for name, value in values.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return fp_run(command)


@pytest.mark.parametrize("name", [*SYSTEMS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_checkpoint_to_video(name, exported, tmp_path, capsys):
    checkpoint, path = exported(name)
    bundle = Bundle(path)
    bundle.verify()
    assert stage_parts(bundle.manifest.stages, "dit") == (["dit_0_1", "dit_1_2"] if name in CUT else [])
    assert bundle.config.system == SYSTEMS.get(name, "factorportrait")
    notes = bundle.manifest.provenance["notes"]
    assert any(note.startswith("system ") for note in notes)
    if bundle.config.system == "factorportrait":
        assert any("untrained: reference" in note for note in notes)
    capsys.readouterr()
    assert run(path, tmp_path / "out.mp4") == 0
    assert f"guidance {6 if name in GUIDED else 1} (the default)" in capsys.readouterr().out
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.std() > 5
    # Nothing of it is repeated work: the second export finds it done.
    capsys.readouterr()
    command = [str(checkpoint), "--size", f"{SIZE}x{SIZE}", "--output", str(path), "--json"]
    command += ["--blocks-per-graph", "1"] if name in CUT else []
    command += ["--prompt-embeddings", str(checkpoint / "prompt.npy")] if (checkpoint / "prompt.npy").is_file() else []
    assert fp_export(command) == 0 and json.loads(capsys.readouterr().out)["up_to_date"]


class Clip:
    """One run's inputs, and the networks of its checkpoint in torch."""

    def __init__(self, checkpoint: Path, bundle: Path, frames: int = FRAMES):
        self.bundle = Bundle(bundle)
        self.config = self.bundle.config
        options = Options(size=(SIZE, SIZE), prompt=checkpoint / "prompt.npy")
        self.released = open_released(checkpoint, options)
        self.network = open_transformer(checkpoint / "transformer" if (checkpoint / "transformer").is_dir() else _file(checkpoint))
        self.portrait = load_portrait(INPUTS / "portrait.png", SIZE, SIZE)
        self.driving = list(open_inputs(self.bundle, INPUTS / "driving_clip", num_frames=frames))
        self.vae = diffusers_vae(self.config.vae)
        self.vae.load_state_dict({name: value.load() for name, value in open_weights(checkpoint / "vae").tensors.items()})
        statistics = self.config.vae.latents_mean, self.config.vae.latents_std
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
        self.text = self.prompt(PROMPT)
        self.num_latents = 1 + (frames - 1) // 4

    def prompt(self, name: str) -> torch.Tensor:
        """A prompt of the bundle with the zeros behind it."""
        rows = self.bundle.constants()[name]
        text = torch.zeros(1, TEXT_TOKENS, self.config.dit.text_dim)
        text[0, : len(rows)] = torch.from_numpy(rows)
        return text

    def ours(self):
        """The torch module, in fp32."""
        return LazyTransformer(self.config, self.released.tensors, "test").with_weights("")

    def theirs(self):
        """diffusers' transformer with the weights of the file."""
        model = diffusers_transformer(self.network.config)
        found = open_weights(self.network_path()).tensors
        model.load_state_dict({name: value.load().float() for name, value in found.items()}, strict=False)
        return model

    def network_path(self) -> Path:
        return Path(self.network.where).parent

    @torch.no_grad()
    def encode(self, frames) -> torch.Tensor:
        """uint8 frames, or one colour in -1..1, -> normalised latents [1,C,F,h,w]."""
        video = torch.stack([torch.from_numpy(np.array(frame)).float() for frame in frames]) / 127.5 - 1
        return self.normalise(self.vae.encode(video.permute(3, 0, 1, 2)[None]).latent_dist.mode())

    def normalise(self, latents):
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        frames = self.vae.decode(latents * self.std + self.mean).sample[0].permute(1, 2, 3, 0)
        return np.clip(np.rint((frames.numpy() + 1) * 127.5), 0, 255).astype(np.uint8)

    def noise(self, first: int, frames: int, step: int = 0) -> torch.Tensor:
        config = self.config
        out = np.empty((1, config.vae.z_dim, frames, config.latent_height, config.latent_width), np.float32)
        return torch.from_numpy(NoiseSource(0, (out.shape[1], *out.shape[3:])).draw(first, frames, step, out))

    def sample(self, x: torch.Tensor, predict) -> torch.Tensor:
        """The checkpoint's solver over all of x [1,C,F,h,w]; `predict(x, timestep)` is the velocity."""
        generation = self.config.generation
        schedule = flow_schedule(STEPS, generation.timestep_shift, generation.solver)
        outputs = []
        with torch.no_grad():
            for step in range(STEPS):
                outputs.insert(0, predict(x, float(schedule.timesteps[step])))
                x = schedule.sample[step] * x + sum(c * v for c, v in zip(schedule.outputs[step], outputs, strict=False))
                x = x.float()
        return x

    def generated(self, **options) -> np.ndarray:
        """What the runtime makes of it."""
        session = open_bundle(self.bundle.path, threads=1).session(steps=STEPS, **options)
        session.set_reference(self.portrait)
        return np.stack(list(session.frames(self.driving)))


def _file(checkpoint: Path) -> Path:
    names = "self_forcing_dmd.pt", "diffusion_pytorch_model.safetensors"
    return next(checkpoint / name for name in names if (checkpoint / name).is_file())


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 5  # pictures, and not one colour
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= TOLERANCE


def test_untrained_factorportrait_is_t2v_behind_a_clean_slot(exported):
    """New input channels are zero, so diffusers' T2V predicts the same, given an empty slot 0 at timestep 0."""
    clip = Clip(*exported("t2v-1.3b"))
    model, tokens = clip.theirs(), clip.config.tokens_per_frame

    def predict(x, timestep):
        slots = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2)
        times = torch.full((1, slots.shape[2] * tokens), timestep)
        times[:, :tokens] = 0
        return model(slots, times, clip.text, return_dict=False)[0][:, :, 1:]

    assert_same(clip.generated(), clip.decode(clip.sample(clip.noise(0, clip.num_latents), predict)))


def test_animate_is_diffusers(exported):
    """Reference slot with mask 1, grey frames with mask 0, pose from slot 1 on, face pictures, CLIP's tokens."""
    from transformers import CLIPVisionModel

    from factorportrait.export.weights.encoders import CLIP_MEAN, CLIP_STD
    from factorportrait.runtime.media.fit import resize

    checkpoint, bundle = exported("animate-14b")
    clip = Clip(checkpoint, bundle)
    model = clip.theirs()
    encoder = CLIPVisionModel.from_pretrained(checkpoint / "image_encoder").eval()
    side = encoder.config.image_size
    picture = torch.from_numpy(clip.portrait.copy()).permute(2, 0, 1)[None].float() / 255
    picture = F.interpolate(picture, (side, side), mode="bicubic", align_corners=False)
    picture = (picture - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    reference, pose = clip.encode([clip.portrait]), clip.encode([frame.normals for frame in clip.driving])
    grey = clip.normalise(clip.vae.encode(torch.zeros(1, 3, FRAMES, SIZE, SIZE)).latent_dist.mode())
    given = torch.cat([reference, grey], dim=2)
    mask = torch.zeros(1, 4, *given.shape[2:])
    mask[:, :, 0] = 1
    faces = [resize(frame.image, clip.config.dit.face.image_size) for frame in clip.driving]
    faces = torch.stack([torch.from_numpy(face.copy()) for face in faces]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        tokens = encoder(picture, output_hidden_states=True).hidden_states[-2]

    def predict(x, timestep):
        return model(
            torch.cat([x, mask, given], dim=1), torch.tensor([timestep]), clip.text, tokens, pose, faces, return_dict=False
        )[0]

    latents = clip.sample(clip.noise(0, 1 + clip.num_latents), predict)
    assert_same(clip.generated(), clip.decode(latents[:, :, 1:]))


@pytest.mark.parametrize("name", ["fun-control", "fun-camera"])
def test_fun_is_its_module_over_the_whole_clip(name, exported):
    """Control: the portrait in a slot of its own, at the step's timestep. Camera: a first frame, and rays from its camera.

    Both away from the negative prompt, by the guidance of the recipe.
    """
    checkpoint, bundle = exported(name)
    clip = Clip(checkpoint, bundle)
    model, control = clip.ours(), name == "fun-control"
    portrait = clip.encode([clip.portrait])
    frames, height, width = clip.num_latents, *portrait.shape[3:]
    empty = torch.zeros(1, 16, frames, height, width)
    if control:
        poses = clip.encode([frame.normals for frame in clip.driving])
        tokens = model.embed_streams({"control": poses, "image": empty})
        tokens = torch.cat([embed_reference(model, portrait), tokens], dim=1)
    else:
        first = torch.cat([portrait, empty[:, :, 1:]], dim=2)
        start = np.linalg.inv(clip.driving[0].c2w)
        rays = [ray_maps(frame.K[None], (start @ frame.c2w)[None], SIZE, SIZE, 1)[0] for frame in clip.driving]
        groups = [[rays[0]] * 4, *(rays[i : i + 4] for i in range(1, len(rays), 4))]
        # [6 values, 4 frames] of a latent frame on channels, the value slowest.
        packed = torch.from_numpy(np.stack([np.stack(group, axis=1).reshape(24, SIZE, SIZE) for group in groups], axis=1))[None]
        tokens = model.embed_streams({"image": first}) + model.control_adapter(packed)
    with torch.no_grad():
        image_kv = model.embed_image(_clip_tokens(checkpoint, clip.portrait))
        texts = [model.embed_text(text) for text in (clip.text, clip.prompt(NEGATIVE_PROMPT))]
    lead, guidance = int(control), 6

    def predict(x, timestep):
        slots = torch.cat([torch.zeros(1, 16, lead, height, width), x], dim=2)
        temb, projection = model.embed_time(torch.full((1, lead + frames), timestep))
        nothing = torch.zeros(1, lead + frames, 6, clip.config.dit.dim)
        given, negative = (
            model(slots, tokens, nothing, temb, projection, torch.arange(lead + frames), text_kv=text_kv, image_kv=image_kv)[0]
            for text_kv in texts
        )
        return (negative + guidance * (given - negative))[:, :, lead:]

    assert_same(clip.generated(), clip.decode(clip.sample(clip.noise(0, frames), predict)))


def _clip_tokens(checkpoint: Path, portrait: np.ndarray) -> torch.Tensor:
    from factorportrait.export.weights.encoders import open_image_encoder

    encoder = open_image_encoder(next(checkpoint.glob("models_clip*")), 16)
    picture = torch.from_numpy(portrait.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return encoder(picture)


@pytest.mark.parametrize("cache", ["inplace", "concat"])
def test_self_forcing_rolls_without_a_sink(cache, exported):
    """A still first chunk is committed, then chunks of 3 see the window before them and no more; four chunks, a window of 6."""
    checkpoint, bundle = exported("self-forcing")
    clip, chunk, window = Clip(checkpoint, bundle, frames=45), 3, 6
    model = clip.ours()
    schedule = flow_schedule(STEPS, clip.config.generation.timestep_shift, clip.config.generation.solver)
    nothing = torch.zeros(1, chunk, 6, clip.config.dit.dim)
    kept: list[list] = []  # per committed frame, per block keys and values [1,1,T,D]
    latents = []
    with torch.no_grad():
        text_kv = model.embed_text(clip.text)
        tokens = embed_nothing(model, 1, chunk)

        def evaluate(x, timestep, past):
            temb, projection = model.embed_time(torch.full((1, chunk), timestep))
            kv = None
            if past:
                kv = [tuple(torch.cat(part, dim=1) for part in zip(*block, strict=True)) for block in zip(*past, strict=True)]
            # Positions count from the oldest frame that is seen.
            positions, before = torch.arange(len(past), len(past) + chunk), torch.arange(len(past)) if past else None
            return model(x, tokens, nothing, temb, projection, positions, before, kv, text_kv)

        for index in range(0, 12, chunk):
            past = kept[max(0, index + chunk - window) :]
            x = clip.encode([clip.portrait] * 9) if index == 0 else clip.noise(index, chunk)
            for step in range(STEPS if index else 0):
                velocity, _ = evaluate(x, float(schedule.timesteps[step]), past)
                x = schedule.sample[step] * x + schedule.outputs[step][0] * velocity
                x = (x + schedule.noise[step] * clip.noise(index, chunk, step + 1)).float()
            _, new = evaluate(x, 0.0, past)
            kept += [[(k[:, i : i + 1], v[:, i : i + 1]) for k, v in new] for i in range(chunk)]
            latents.append(x)
    expected = clip.decode(torch.cat(latents, dim=2))
    assert_same(clip.generated(window_frames=window, cache=cache), expected)


BAD_CHECKPOINTS = {
    "another system": (lambda folder: None, ["--system", "wan-animate"], "expected factorportrait or self-forcing"),
    "a size between patches": (lambda folder: None, ["--size", "60x64"], "expected multiples of 16; found 64 x 60"),
    "no size": (lambda folder: None, ["--size", "wide"], "expected WIDTHxHEIGHT in pixels"),
    "int8": (lambda folder: None, ["--precision", "int8"], "take fp16 or int8-weights"),
    "no blocks": (lambda folder: None, ["--blocks-per-graph", "0"], "--blocks-per-graph; expected 1 or more"),
    "no VAE": (lambda folder: (folder / "vae").rename(folder / "other"), [], "name it with --vae"),
    "a cut file": (lambda folder: cut(folder / "transformer" / WEIGHTS), [], "expected a whole safetensors file"),
    "an index without its shard": (
        lambda folder: (folder / "transformer" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'), [],
        "expected its shard b.safetensors beside it",
    ),
    "a config of another network": (
        lambda folder: edit(folder / "transformer" / "config.json", ffn_dim=65), [], "ffn_dim; expected 64",
    ),
    "half of it in another type": (lambda folder: retype(folder / "transformer" / WEIGHTS), [], "every block in the same types"),
    "a LoRA for another network": (lambda folder: lora(folder, "blocks.7.attn1.to_q", 4), ["--lora", "LORA"], "blocks.7.attn1"),
    "a LoRA of two ranks": (lambda folder: lora(folder, "blocks.0.attn1.to_q", 3), ["--lora", "LORA:0.5"], "up factor of rank 4"),
    "a prompt of another width": (
        lambda folder: np.save(folder / "prompt.npy", np.zeros((3, 5))), ["--prompt-embeddings", "prompt.npy"], "[tokens, 24]",
    ),
    "an expert of two": (lambda folder: (folder / "transformer_2").mkdir(), [], "found one of two: transformer_2"),
    "a LoRA of no scale": (lambda folder: None, ["--lora", "LORA:nan"], "expected a finite scale; found nan"),
    "a picture encoder for a network without": (
        lambda folder: (folder / "clip.d").mkdir(), ["--image-encoder", "clip.d"], "leave it out",
    ),
    "no such decoder": (lambda folder: None, ["--decoder", "none.pth"], "none.pth; expected a file or folder; found nothing"),
    "a budget that is not judged": (
        lambda folder: None, ["--precision", "fp16", "--max-quality-loss-db", "1"], "--max-quality-loss-db; expected a checkpoint",
    ),
    "a decoder that is none": (
        lambda folder: torch.save({"a": torch.zeros(2)}, folder / "taew.pth"), ["--decoder", "taew.pth"], "expected a tiny decoder",
    ),
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retype(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: value.float() if name.startswith("blocks.1.") else value for name, value in tensors.items()}, file)


def lora(folder: Path, module: str, up_rank: int) -> None:
    save_file(
        {f"{module}.lora_A.weight": torch.zeros(4, 128), f"{module}.lora_B.weight": torch.zeros(128, up_rank)}, folder / "LORA"
    )
    (folder / "LORA").rename(folder / "lora.safetensors")


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoint"
    write_release("t2v-1.3b", folder, tiny=True)
    return folder


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_line(case, two_blocks, tmp_path, capsys):
    harm, given, words = BAD_CHECKPOINTS[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(two_blocks, folder)
    harm(folder)
    places = {"LORA": "lora.safetensors", "LORA:0.5": "lora.safetensors:0.5", "LORA:nan": "lora.safetensors:nan"}
    options = [str(folder / places.get(word, word)) if "." in places.get(word, word) else word for word in given]
    options += [] if "--size" in given else ["--size", "64x64"]
    assert fp_export([str(folder), "--output", str(tmp_path / "bundle"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert words in line and not (tmp_path / "bundle").exists()


def test_an_expert_alone_is_refused(two_blocks, tmp_path):
    """Wan2.2-A14B's folders and files, even where a VAE is named."""
    expert = tmp_path / "A14B" / "high_noise_model"
    shutil.copytree(two_blocks / "transformer", expert)
    alone = tmp_path / "wan2.2_t2v_low_noise_14B.safetensors"
    shutil.copyfile(expert / WEIGHTS, alone)
    shutil.copytree(two_blocks, tmp_path / "diffusers")
    shutil.copytree(two_blocks / "transformer", tmp_path / "diffusers" / "transformer_2")
    for path in (tmp_path / "A14B", expert, expert / WEIGHTS, alone, *(tmp_path / "diffusers").glob("transformer*")):
        with pytest.raises(CheckpointError, match="expected one transformer that denoises every step; found one of two"):
            open_released(path, Options(vae=two_blocks / "vae"))


def test_scales_of_loras():
    assert parse_lora("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    assert parse_lora("C:a.safetensors") == (Path("C:a.safetensors"), 1.0)
    for scale in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match=f"--lora a:{scale}; expected a finite scale"):
            parse_lora(f"a:{scale}")


def test_the_plan_is_told_and_checked_before_files_are_read(two_blocks, tmp_path, monkeypatch):
    def read(*given):
        raise InterruptedError

    def export(output: Path) -> list[str]:
        notes = []
        with pytest.raises(expected):
            released.export_released(two_blocks, output, Options(size=(SIZE, SIZE)), on_note=notes.append)
        return notes

    monkeypatch.setattr(released, "_digests", read)
    expected = InterruptedError
    assert export(tmp_path / "bundle")[-1].startswith("plan: ")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1000, 999, 1))
    expected = UserError
    assert export(tmp_path / "bundle")[-1].startswith("plan: ")
    # A bundle that is there may be up to date, and then needs no room.
    expected = InterruptedError
    (tmp_path / "old").mkdir()
    export(tmp_path / "old")


def test_guidance_needs_a_negative_prompt(tmp_path):
    write_release("fun-camera", tmp_path / "checkpoint", tiny=True, layers=1)
    np.save(tmp_path / "prompt.npy", np.zeros((3, 24), np.float32))
    for prompt, negative, scale, words in (
        (None, None, 6, "guidance: 6 away from the negative prompt"), (True, None, 1, "guidance: none, though"),
        (True, True, 6, "guidance: 6"),
    ):  # fmt: skip
        files = {name: tmp_path / "prompt.npy" for name, given in (("prompt", prompt), ("negative", negative)) if given}
        found = open_released(tmp_path / "checkpoint", Options(size=(SIZE, SIZE), **files))
        assert found.config.generation.guidance_scale == scale
        assert any(note.startswith(words) for note in found.notes)
        assert (tmp_path / "prompt.npy" in found.files) == bool(files)


def test_a_synthetic_release_without_transformers_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert synthetic.main(["fun-control", str(tmp_path / "checkpoint"), "--tiny"]) == 2
    error = capsys.readouterr().err
    assert "expected the package transformers; found none" in error and error.count("\n") == 1
    assert not (tmp_path / "checkpoint").exists()


def test_files_of_one_name_have_a_digest_each(tmp_path):
    files = [tmp_path / name / "lora.safetensors" for name in ("a", "b", "c")]
    for file in files:
        file.parent.mkdir()
        file.write_text(file.parent.name)
    found = _digests(tmp_path / "a", tuple(files))
    assert list(found)[0] == "lora.safetensors" and sorted(found.values()) == sorted(map(sha256_file, files))
    assert list(_digests(files[0], (files[0],))) == ["lora.safetensors"]


def test_memory_of_the_text_encoder_is_asked_for(two_blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(released, "check_room", lambda plan, output: None)
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    assert fp_export([str(two_blocks), "--size", "64x64", "--output", str(tmp_path / "bundle")]) == 2
    assert "compute them elsewhere and give --prompt-embeddings FILE" in capsys.readouterr().err


def test_a_fixed_number_of_slots_takes_no_second_copy_of_the_weights(tmp_path):
    write_release("self-forcing", tmp_path / "checkpoint", tiny=True, layers=1)
    found = open_released(tmp_path / "checkpoint", Options(size=(SIZE, SIZE)))
    model = ReleasedModel(found.config, LazyTransformer(found.config, found.tensors, found.where), vae=None)
    stage = transformer_stage(model, "dit_inplace", 0, 1)
    own = variants.Context(model, DrawnCases(model).longest, in_place=partial(with_capacity, model)).with_capacity(stage)
    assert own.module.capacity == found.config.generation.window_frames  # no sink in front of it
    fixed = with_capacity(model, stage, 7)
    assert stage.module.capacity is None and fixed.module.capacity == 7
    rows = [dict(zip(each.input_names, each.args, strict=True))["cache_k.0"].shape[2] for each in (stage, fixed)]
    assert rows == [EXAMPLE_SIZES["S"] * found.config.tokens_per_frame, 7 * found.config.tokens_per_frame]
    assert all(a is b for a, b in zip(stage.module.parameters(), fixed.module.parameters(), strict=True))


def test_options_of_released_checkpoints_are_for_them(tiny_checkpoint, tmp_path, capsys):
    assert fp_export([str(tiny_checkpoint), "--lora", "a.safetensors", "--output", str(tmp_path / "bundle")]) == 2
    assert "--lora; expected a released checkpoint" in capsys.readouterr().err


def test_a_pickle_with_code_is_not_run(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"generator_ema": {"model.a": Code()}}, tmp_path / "self_forcing.pt")
    command = [str(tmp_path / "self_forcing.pt"), "--vae", str(tmp_path), "--output", str(tmp_path / "bundle")]
    assert fp_export(command) == 2
    assert "which was not run" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_bad_runs_are_one_line(exported, tmp_path, capsys):
    _, bundle = exported("self-forcing")
    np.save(tmp_path / "wide.npy", np.zeros((3, 25), np.float32))
    np.save(tmp_path / "long.npy", np.zeros((513, 24), np.float32))
    cases = [
        ({"prompt_embeddings": tmp_path / "none.npy"}, "found no such file"),
        ({"prompt_embeddings": tmp_path / "wide.npy"}, "expected an array [tokens, 24]"),
        ({"prompt_embeddings": tmp_path / "long.npy"}, "at most 512 tokens"),
        ({"image_embeddings": tmp_path / "wide.npy"}, "--image-embeddings; expected a transformer that looks at such"),
        ({"control": INPUTS / "driving.mp4"}, "expected a system that follows such a video; found self-forcing"),
        ({"mode": "clip"}, "--mode; expected stream"),
        ({"control": INPUTS / "driving.mp4", "pose_from": INPUTS / "arkit.csv"}, "expected one source of the pose; found two"),
    ]
    for changes, words in cases:
        assert run(bundle, tmp_path / "out.mp4", **changes) == 2
        assert words in capsys.readouterr().err
    # A bundle that was exported without a prompt.
    bare = tmp_path / "bare"
    shutil.copytree(bundle, bare)
    write_arrays(bare / "constants.npz", {name: value for name, value in Bundle(bundle).constants().items() if name != PROMPT})
    manifest = json.loads((bare / "manifest.json").read_text())
    manifest["files"]["constants.npz"] = {
        "sha256": sha256_file(bare / "constants.npz"), "bytes": (bare / "constants.npz").stat().st_size,
    }  # fmt: skip
    (bare / "manifest.json").write_text(json.dumps(manifest))
    assert run(bare, tmp_path / "out.mp4") == 2 and "give --prompt-embeddings FILE" in capsys.readouterr().err
    np.save(tmp_path / "prompt.npy", np.ones((2, 24), np.float32))
    assert run(bare, tmp_path / "out.mp4", prompt_embeddings=tmp_path / "prompt.npy", frames=5) == 0


def test_commands_that_know_factorportrait_alone_say_so(exported, capsys):
    _, bundle = exported("self-forcing")
    assert fp_export(["verify", str(bundle)]) == 2
    assert "found self-forcing in" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected FactorPortrait.*found one of self-forcing"):
        materialise(Case(name="public", bundle=str(bundle), mode="stream"))


def test_what_conditions_change(exported, tmp_path):
    """Each input that a system looks at changes its pictures; the agreement with the references above is none of constants."""
    clip = Clip(*exported("animate-14b"))
    plain = clip.generated()
    draw = np.random.default_rng(0).standard_normal
    np.save(tmp_path / "prompt.npy", 3 * draw((TEXT_TOKENS, 24), np.float32))
    np.save(tmp_path / "image.npy", 3 * draw((5, 16), np.float32))
    for changes in (
        {"prompt_embeddings": tmp_path / "prompt.npy"}, {"image_embeddings": tmp_path / "image.npy"}, {"guidance": "pose=0"},
        {"guidance": "reference=0"}, {"guidance": "3"},
    ):  # fmt: skip
        difference = np.abs(clip.generated(**changes).astype(int) - plain.astype(int)).max()
        assert difference > 4 * TOLERANCE, changes


@pytest.mark.parametrize(
    ("name", "seen"),
    [("self-forcing", {"text"}), ("fun-control", {"text", "pose", "reference"}), ("fun-camera", {"text", "camera", "reference"}),
     ("animate-14b", {"text", "pose", "reference", "expression"})],
)  # fmt: skip
def test_guidance_of_what_a_system_does_not_look_at_is_refused(name, seen, tmp_path):
    write_release(name, tmp_path / "checkpoint", tiny=True, layers=1)
    config = open_released(tmp_path / "checkpoint", Options(size=(SIZE, SIZE))).config
    for factor in FACTORS:
        guidance = parse_guidance(f"{factor}=2", 3)
        if factor in seen:
            assert wan_guidance(guidance, config) == guidance
        else:
            with pytest.raises(UserError, match=f"--guidance {factor}"):
                wan_guidance(guidance, config)
    assert wan_guidance(parse_guidance("2", 3), config).dropped == (frozenset(), frozenset({"text", "expression"}))


def test_systems_are_data():
    """Every recipe has an example that names its system's weights, and every system has a recipe."""
    assert {recipe.system for recipe in recipes()} == set(SYSTEM_TABLE)
    assert all(recipe.example.startswith("fp-export ") and recipe.source for recipe in recipes())
    assert {recipe.name for recipe in recipes()} >= set(PUBLISHED) - {"Wan2.1-I2V-14B"}
