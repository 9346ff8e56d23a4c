"""The published Wan transformers against diffusers with the same random weights; Fun, which diffusers lacks, against its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from helpers import difference
from torch import nn
from wan_models import diffusers_transformer, embed_face, embed_nothing, embed_reference, random_weights, with_noise

from factorportrait.export.models.animate import FoldedMotionEncoder
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.weights import layouts
from factorportrait.export.weights.networks import Network, rows_of
from factorportrait.export.weights.released import recipes
from factorportrait.export.weights.synthetic import diffusers_config
from factorportrait.model_config import DiTConfig, FaceConfig, FusionConfig, RayAdapterConfig
from factorportrait.runtime.schedule import flow_schedule

TOLERANCE = 1e-4  # relative; found up to 3e-6
ROWS, COLUMNS, FRAMES, BATCH = 4, 6, 5, 2
TEXT_LEN = 512  # diffusers tells picture tokens from text by this length
BASE = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, freq_dim=32, text_dim=20)
FACE = FaceConfig(
    image_size=32, encoder_widths=(4, 6, 8, 8), style_dim=10, motion_dim=3, code_dim=14, hidden_dim=8, num_tokens=2,
    block_interval=2,
)  # fmt: skip
GIVEN = FusionConfig(("noise", "mask", "image"))


def network(fusion: FusionConfig, **changes) -> Network:
    return Network(dataclasses.replace(BASE, out_channels=fusion.latent_channels, **changes), fusion)


NETWORKS = {
    "t2v": network(FusionConfig(("noise",))),
    "t2v_heads_of_128": network(FusionConfig(("noise",)), dim=256, num_heads=2, num_layers=1),
    "i2v": network(GIVEN, image_dim=12),
    "i2v_wide": network(GIVEN, image_dim=24, dim=96, num_heads=4, cross_attn_norm=False),
    "ti2v": network(FusionConfig(("noise",), latent_channels=48)),
    "animate": network(GIVEN, image_dim=12, pose_channels=16, num_layers=4, face=FACE),
    "animate_every_block": network(
        GIVEN, image_dim=12, pose_channels=16, num_layers=2,
        face=dataclasses.replace(FACE, image_size=16, encoder_widths=(4, 4, 6), block_interval=1, num_tokens=3),
    ),
}  # fmt: skip


class Inputs:
    """Random inputs of a network, drawn in one order."""

    def __init__(self, network: Network, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        dit, fusion = network.dit, network.fusion
        self.streams = {name: self.normal(BATCH, fusion.channels(name), FRAMES, ROWS, COLUMNS) for name in fusion.streams}
        self.text = self.normal(BATCH, TEXT_LEN, dit.text_dim)
        self.image = self.normal(BATCH, 7, dit.image_dim) if dit.image_dim else None

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    @property
    def hidden_states(self) -> torch.Tensor:
        return torch.cat(list(self.streams.values()), dim=1)


def both(network: Network, seed: int):
    """diffusers' model, and ours with its weights."""
    theirs = with_noise(diffusers_transformer(network), seed)
    ours = WanDiT(network.dit, network.fusion, ROWS, COLUMNS).eval()
    ours.load_state_dict(layouts.from_layout(theirs.state_dict(), rows_of(network), "diffusers"))
    return theirs, ours


def velocity(ours: WanDiT, inputs: Inputs, timesteps: torch.Tensor, tokens: torch.Tensor | None = None, **options):
    """Ours: timesteps [B] or [B,F], condition tokens from the streams unless given."""
    if tokens is None:
        nothing = len(inputs.streams) == 1
        tokens = embed_nothing(ours, BATCH, FRAMES) if nothing else ours.embed_streams(inputs.streams)
    frames = tokens.shape[1]
    noise = F.pad(inputs.streams["noise"], (0, 0, 0, 0, frames - FRAMES, 0))
    temb, proj = ours.embed_time(timesteps if timesteps.dim() == 2 else timesteps[:, None].expand(-1, frames))
    found, _ = ours(
        noise, tokens, torch.zeros(BATCH, frames, 6, ours.config.dim), temb, proj, torch.arange(frames),
        text_kv=ours.embed_text(inputs.text), image_kv=None if inputs.image is None else ours.embed_image(inputs.image),
        **options,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("animate")])
@torch.no_grad()
def test_equals_diffusers(name, seed):
    theirs, ours = both(NETWORKS[name], seed)
    inputs = Inputs(NETWORKS[name], seed)
    timesteps = torch.tensor([981.0, 17.0])
    expected = theirs(inputs.hidden_states, timesteps, inputs.text, inputs.image, return_dict=False)[0]
    assert expected.std() > 0.1
    assert difference(velocity(ours, inputs, timesteps), expected) <= TOLERANCE


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_ti2v_equals_diffusers_with_a_timestep_per_token(seed):
    theirs, ours = both(NETWORKS["ti2v"], seed)
    inputs = Inputs(NETWORKS["ti2v"], seed)
    # The first latent frame is the given picture, clean: timestep 0.
    timesteps = torch.tensor([900.0, 333.0])[:, None].repeat(1, FRAMES)
    timesteps[:, 0] = 0
    per_token = timesteps.repeat_interleave(ROWS * COLUMNS // 4, dim=1)
    expected = theirs(inputs.hidden_states, per_token, inputs.text, return_dict=False)[0]
    assert difference(velocity(ours, inputs, timesteps), expected) <= TOLERANCE


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("animate")])
@torch.no_grad()
def test_animate_equals_diffusers(name, seed):
    network = NETWORKS[name]
    theirs, ours = both(network, seed)
    inputs = Inputs(network, seed)
    size = network.dit.face.image_size
    pose = inputs.normal(BATCH, 16, FRAMES - 1, ROWS, COLUMNS)
    pictures = inputs.normal(BATCH, 3, 1 + 4 * (FRAMES - 2), size, size).clamp(-1, 1)
    timesteps = torch.tensor([640.0, 120.0])
    expected = theirs(
        inputs.hidden_states, timesteps, inputs.text, inputs.image, pose, pictures, return_dict=False
    )[0]  # fmt: skip

    encoder = FoldedMotionEncoder(ours.motion_encoder)
    flat = pictures.transpose(1, 2).flatten(0, 1)
    codes = encoder(flat)
    assert difference(codes, theirs.motion_encoder(flat)) <= TOLERANCE
    assert difference(ours.motion_encoder(flat), codes) <= TOLERANCE
    face_kv = embed_face(ours, codes.unflatten(0, (BATCH, -1)))
    tokens = ours.embed_streams(inputs.streams) + F.pad(ours.embed_pose(pose), (0, 0, 0, 0, 1, 0))
    found = velocity(ours, inputs, timesteps, tokens, face_kv=face_kv)
    assert difference(found, expected) <= TOLERANCE
    # The face reaches the picture; without it the comparison would say little.
    without = velocity(ours, inputs, timesteps, tokens, face_kv=[(0 * k, 0 * v) for k, v in face_kv])
    assert difference(without, expected) > 100 * TOLERANCE


@torch.no_grad()
def test_ranges_of_blocks_keep_their_adapters():
    network = NETWORKS["animate"]
    _, ours = both(network, 0)
    inputs = Inputs(network, 0)
    temb, proj = ours.embed_time(torch.full((BATCH, FRAMES), 500.0))
    x = ours.embed_noise(inputs.streams["noise"]) + ours.embed_streams(inputs.streams)
    face_kv = embed_face(ours, inputs.normal(BATCH, 1 + 4 * (FRAMES - 2), FACE.code_dim))
    text_kv, image_kv = ours.embed_text(inputs.text), ours.embed_image(inputs.image)
    rotary = ours.rotary_pair(torch.arange(FRAMES), None)
    expected, _ = ours.run_blocks(
        ours.blocks, x, proj.float(), rotary, None, text_kv, None, image_kv, ours.adapters_of(0, 4, face_kv)
    )
    for start, end in ((0, 1), (1, 4)):
        x, _ = ours.run_blocks(
            ours.blocks[start:end], x, proj.float(), rotary, None, text_kv[start:end], None, image_kv[start:end],
            ours.adapters_of(start, end, face_kv),
        )  # fmt: skip
    assert torch.equal(x, expected)


# ---- Self-Forcing ----------------------------------------------------------------------------------------------------------


class Masked(WanAttnProcessor):
    """diffusers' attention with a mask in the place that its blocks leave open."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_self_forcing_s_cached_stream_equals_diffusers_with_a_causal_mask(seed):
    """Four renoise steps and a clean commit per chunk of 3, three chunks; diffusers recomputes everything in every step."""
    (sampling,) = (recipe.generation for recipe in recipes() if recipe.name == "Self-Forcing-1.3B")
    network = NETWORKS["t2v"]
    theirs, ours = both(network, seed)
    schedule = flow_schedule(sampling.denoising_steps, sampling.timestep_shift, sampling.solver)
    generator = torch.Generator().manual_seed(seed)
    chunk, tokens = sampling.chunk_frames, ROWS * COLUMNS // 4
    text = torch.randn(BATCH, 9, network.dit.text_dim, generator=generator)
    text_kv = ours.embed_text(text)
    done: list[torch.Tensor] = []
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # per committed chunk, per block
    for index in range(3):
        seen = index * chunk
        slot = torch.arange(seen + chunk).div(chunk, rounding_mode="floor").repeat_interleave(tokens)
        for block in theirs.blocks:
            block.attn1.set_processor(Masked((slot[:, None] >= slot)[None, None]))
        past_kv = None
        if caches:
            past_kv = [tuple(torch.cat(parts, dim=1) for parts in zip(*kept, strict=True)) for kept in zip(*caches, strict=True)]

        def evaluate(x, timestep, seen=seen, past_kv=past_kv):
            temb, proj = ours.embed_time(torch.full((BATCH, chunk), timestep))
            return ours(
                x, embed_nothing(ours, BATCH, chunk), torch.zeros(BATCH, chunk, 6, ours.config.dim), temb, proj,
                torch.arange(seen, seen + chunk), torch.arange(seen), past_kv, text_kv,
            )  # fmt: skip

        x = torch.randn(BATCH, 16, chunk, ROWS, COLUMNS, generator=generator)
        for step in range(schedule.num_steps):
            timestep = float(schedule.timesteps[step])
            found, _ = evaluate(x, timestep)
            timesteps = torch.tensor([0.0] * seen + [timestep] * chunk).repeat_interleave(tokens).expand(BATCH, -1)
            expected = theirs(torch.cat([*done, x], dim=2), timesteps, text, return_dict=False)[0][:, :, seen:]
            assert difference(found, expected) <= TOLERANCE
            noise = torch.randn(x.shape, generator=generator)
            x = float(schedule.sample[step]) * x + float(schedule.outputs[step, 0]) * found + float(schedule.noise[step]) * noise
        done.append(x)
        caches.append(evaluate(x, 0.0)[1])


# ---- Wan2.1-Fun ------------------------------------------------------------------------------------------------------------


class FunOracle:
    """Fun's forward pass as its authors describe it, from diffusers' blocks and torch's own layers, tokens in one row."""

    def __init__(self, network: Network, ours: WanDiT):
        plain = dataclasses.replace(network.dit, reference_channels=None, ray_adapter=None)
        self.model = WanTransformer3DModel(**diffusers_config(Network(plain, network.fusion))).eval()
        weights = ours.state_dict()
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith(("ref_conv", "control_adapter"))}
        self.model.load_state_dict(layouts.to_layout(rest, layouts.TRANSFORMER, "diffusers"))
        self.weights = weights

    def __call__(self, hidden_states, timesteps, text, image, reference=None, rays=None):
        model, weights = self.model, self.weights
        x = model.patch_embedding(hidden_states)
        if rays is not None:
            batch, _, frames, _, _ = rays.shape
            added = []
            for frame in range(frames):
                y = nn.PixelUnshuffle(8)(rays[:, :, frame])
                y = F.conv2d(y, weights["control_adapter.conv.weight"], weights["control_adapter.conv.bias"], stride=2)
                stem = "control_adapter.residual_blocks.0.conv"
                inner = F.relu(F.conv2d(y, weights[f"{stem}1.weight"], weights[f"{stem}1.bias"], padding=1))
                added.append(y + F.conv2d(inner, weights[f"{stem}2.weight"], weights[f"{stem}2.bias"], padding=1))
            x = x + torch.stack(added, dim=2)
        frames, rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        grid = hidden_states
        if reference is not None:
            slot = F.conv2d(reference[:, :, 0], weights["ref_conv.weight"], weights["ref_conv.bias"], stride=2)
            x = torch.cat([slot.flatten(2).transpose(1, 2), x], dim=1)
            grid = F.pad(hidden_states, (0, 0, 0, 0, 1, 0))
        temb, proj, text, image = model.condition_embedder(timesteps, text, image)
        context, rotary = torch.cat([image, text], dim=1), model.rope(grid)
        for block in model.blocks:
            x = block(x, context, proj.unflatten(1, (6, -1)), rotary)
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)[:, -frames * rows * columns :]
        x = x.reshape(len(x), frames, rows, columns, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_fun_control_equals_its_description(seed):
    fun = network(FusionConfig(("noise", "control", "image")), image_dim=12, reference_channels=16)
    ours = WanDiT(fun.dit, fun.fusion, ROWS, COLUMNS).eval()
    ours.load_state_dict(random_weights(Network(fun.dit, fun.fusion), seed))
    inputs = Inputs(fun, seed)
    reference, timesteps = inputs.normal(BATCH, 16, 1, ROWS, COLUMNS), torch.tensor([700.0, 80.0])
    expected = FunOracle(fun, ours)(inputs.hidden_states, timesteps, inputs.text, inputs.image, reference=reference)
    # The reference is slot 0 of ours: its noise is zero, and its velocity is dropped.
    tokens = torch.cat([embed_reference(ours, reference), ours.embed_streams(inputs.streams)], dim=1)
    found = velocity(ours, inputs, timesteps, tokens)[:, :, 1:]
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_fun_control_camera_equals_its_description(seed):
    fun = network(FusionConfig(("noise", "image")), image_dim=12, ray_adapter=RayAdapterConfig())
    ours = WanDiT(fun.dit, fun.fusion, ROWS, COLUMNS).eval()
    ours.load_state_dict(random_weights(Network(fun.dit, fun.fusion), seed))
    inputs = Inputs(fun, seed)
    rays, timesteps = inputs.normal(BATCH, 24, FRAMES, 8 * ROWS, 8 * COLUMNS), torch.tensor([700.0, 80.0])
    expected = FunOracle(fun, ours)(inputs.hidden_states, timesteps, inputs.text, inputs.image, rays=rays)
    tokens = ours.embed_streams(inputs.streams) + ours.control_adapter(rays)
    assert difference(velocity(ours, inputs, timesteps, tokens), expected) <= TOLERANCE


# ---- graphs ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformer_with_text_picture_and_face_becomes_a_graph(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = NETWORKS["animate"]
    model = WanDiT(network.dit, network.fusion, ROWS, COLUMNS).eval()
    model.load_state_dict(random_weights(network))
    inputs = Inputs(network, 4)
    inputs.streams = {name: stream[:1] for name, stream in inputs.streams.items()}
    temb, proj = model.embed_time(torch.full((1, FRAMES), 500.0))
    kept = (model.embed_text(inputs.text[:1]), model.embed_image(inputs.image[:1]),
            embed_face(model, inputs.normal(1, 1 + 4 * (FRAMES - 2), FACE.code_dim)))  # fmt: skip
    layers = network.dit.num_layers

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, noise, tokens, modulation, temb, proj, positions, *pairs):
            pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
            text, image, face = pairs[:layers], pairs[layers : 2 * layers], pairs[2 * layers :]
            velocity, _ = self.model(
                noise, tokens, modulation, temb, proj, positions, text_kv=text, image_kv=image, face_kv=face
            )
            return velocity

    arguments = (
        inputs.streams["noise"], model.embed_streams(inputs.streams), torch.zeros(1, FRAMES, 6, network.dit.dim), temb, proj,
        torch.arange(FRAMES), *(tensor for pairs in kept for pair in pairs for tensor in pair),
    )  # fmt: skip
    torch.onnx.export(Flat().eval(), arguments, dynamo=True, opset_version=23, verbose=False).save(tmp_path / "dit.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "dit.onnx", providers=["CPUExecutionProvider"])
    # Others than the exporter saw.
    arguments = (arguments[0] * 0.7, *arguments[1:])
    (found,) = session.run(None, {spec.name: a.numpy() for spec, a in zip(session.get_inputs(), arguments, strict=True)})
    assert difference(torch.from_numpy(found), Flat()(*arguments)) <= TOLERANCE
