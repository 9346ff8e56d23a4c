"""Phase 2: the expression encoder (picture -> code) and the map from ARKit coefficients to the same code.

The code is fixed beforehand: coefficients weighted by how often and how far they move the face, turned by a random orthonormal
basis. The map fits it; the encoder regresses it from pictures of any person, view and head pose, and so becomes invariant to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.train.data import ClipStore, to_unit
from demo.train.trainer import Draw, Metrics
from demo.world.head import load_basis
from factorportrait.arkit import ARKIT_NAMES
from factorportrait.errors import CheckpointError

STD_FLOOR = 0.05  # rare actions are not blown up beyond this
GAZE_REACH = 0.005  # metres that an iris moves; the basis turns eyeballs instead of moving their vertices
COLOUR_JITTER = 0.25  # of the gain of each colour channel
JITTER = 0.15  # of the crop's place and size, as a share of the picture
STATISTICS_CLIPS = 256
BASIS_SAMPLES = 8192  # of the map, to find its slopes
NEUTRAL_TOLERANCE = 0.01  # of the neutral code's numbers, which are rounded to half precision
JAW = ARKIT_NAMES.index("jawOpen")
SIDES = {"Left": "Right", "Right": "Left"}


def mirrored_name(name: str) -> str:
    """The action of the other side, such as mouthLeft for mouthRight."""
    for side, other in SIDES.items():
        if name.endswith(side):
            return name.removesuffix(side) + other
    return name


MIRROR = [ARKIT_NAMES.index(mirrored_name(name)) for name in ARKIT_NAMES]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon updates the inner convolutions of the encoder and the inner layer of the map."""
    return parameter.ndim == 4 and name != "encoder.features.0.weight" or name == "arkit.layers.2.weight"


def action_reach() -> Tensor:
    """[52] metres: the farthest that each action moves a vertex of the mean head."""
    reach = np.linalg.norm(load_basis().actions, axis=-1).max(1)
    gaze = np.array([name.startswith("eyeLook") for name in ARKIT_NAMES])
    return torch.from_numpy(np.where(gaze, GAZE_REACH, reach)).float()


def random_basis(code_dim: int, seed: int) -> Tensor:
    """[52, E], orthonormal rows drawn from the seed."""
    random = torch.randn(code_dim, len(ARKIT_NAMES), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(random)[0].T.contiguous()


@dataclass
class CodeBasis:
    """Between coefficients and codes: code = (coefficients - mean) * scale @ basis; the mean variance of a dimension is 1."""

    mean: Tensor  # [52]
    scale: Tensor  # [52]
    basis: Tensor  # [52, E], orthonormal rows

    @classmethod
    def from_clips(cls, store: ClipStore, code_dim: int, seed: int) -> CodeBasis:
        """Statistics of the first clips and a basis drawn from the seed."""
        values = [store.get(clip, "coefficients") for clip in range(min(STATISTICS_CLIPS, len(store)))]
        values = torch.from_numpy(np.concatenate(values)).float()
        std = values.std(0).clamp(min=STD_FLOOR)
        # Half way, on a logarithmic scale, between equal variances and the sizes of the visible movements.
        scale = (action_reach() / std).sqrt()
        scale = scale * (code_dim / (std * scale).square().sum()).sqrt()
        return cls(values.mean(0), scale, random_basis(code_dim, seed))

    @classmethod
    @torch.no_grad()
    def from_weights(cls, arkit: nn.Module, neutral_code: Tensor, seed: int) -> CodeBasis:
        """The basis that a trained map and its neutral code [E] were made for; the seed is that of their training.

        Clips would give it only if exactly those were there that were there then: it is measured while clips are rendered.
        The map is affine but for its error, so its slope is found by least squares, one coefficient after the other.

        Raises:
            CheckpointError: the neutral code does not lie in the seed's basis.
        """
        basis = random_basis(len(neutral_code), seed)
        neutral = neutral_code.cpu() @ basis.T
        outside = float((neutral @ basis - neutral_code.cpu()).abs().max())
        if outside > NEUTRAL_TOLERANCE:
            raise CheckpointError(
                "the neutral code", expected=f"a sum of the basis of seed {seed}", found=f"{outside:.3g} beside it",
                action="give the preset the seed of the checkpoint's training",
            )  # fmt: skip
        draw, count = Draw(seed, "basis", 0, 0), len(ARKIT_NAMES)
        coefficients = sample_coefficients(draw, torch.zeros(0, count), BASIS_SAMPLES)
        device = next(arkit.parameters()).device
        moved = arkit(coefficients.to(device)).float().cpu() @ basis.T - neutral
        scale = (coefficients * moved).sum(0) / coefficients.square().sum(0)
        return cls(-neutral / scale, scale, basis).to(device)

    def to(self, device: torch.device) -> CodeBasis:
        return CodeBasis(self.mean.to(device), self.scale.to(device), self.basis.to(device))

    def code(self, coefficients: Tensor) -> Tensor:
        """[..., 52] -> [..., E], in fp32 under autocast too."""
        with torch.autocast(coefficients.device.type, enabled=False):
            return (coefficients - self.mean) * self.scale @ self.basis

    def coefficients(self, code: Tensor) -> Tensor:
        """[..., E] -> [..., 52], the linear probe."""
        return code @ self.basis.T / self.scale + self.mean


@torch.no_grad()
def scale_layers(net: nn.Module, *inputs: Any) -> None:
    """Scale every layer of `net` so that its channels vary by 1 over `inputs`; biases become 0 (Mishkin and Matas 2016).

    With the default initialisation the input's share shrinks layer by layer, and training stalls: the encoder's behind its biases,
    the controller's because the transformer first learns to ignore it.
    """

    def normalise(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        output = output - (
            layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * (output.ndim - 2))
        )
        channel = -1 if isinstance(layer, nn.Linear) else 1
        deviation = output.movedim(channel, -1).flatten(0, -2).std(0).mean()
        layer.bias.zero_()
        layer.weight /= deviation
        return output / deviation

    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(normalise) for layer in layers]
    net(*inputs)
    for handle in handles:
        handle.remove()


def jitter(images: Tensor, draw: Draw) -> Tensor:
    """[B, 3, S, S] -> the same with another crop, brightness, contrast and tint per picture.

    Places are fp32 under autocast too: in bf16 they were up to half a pixel off.
    """
    amounts = draw.uniform((images.shape[0], 8), images.device) * 2 - 1
    scale, shift = 1 + JITTER * amounts[:, :1], JITTER * amounts[:, 1:3]
    affine = torch.cat([scale, scale * 0, shift[:, :1], scale * 0, scale, shift[:, 1:]], dim=1).view(-1, 2, 3)
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = 1 + 0.2 * amounts[:, 3], 0.15 * amounts[:, 4]
    tint = 1 + COLOUR_JITTER * amounts[:, 5:, None, None]
    tinted = (moved + 1) * tint - 1
    return (tinted * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)).clamp(-1, 1)


def sample_images(store: ClipStore, draw: Draw, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] of `count` different moments of both performances, and their coefficients [B, 52]."""
    rng = draw.rng
    places = []
    for _ in range(count):
        clip, frame = int(rng.integers(len(store))), int(rng.integers(len(store.get(0, "frames"))))
        twin = draw.chance(0.5) and store.has(clip, "twin_frames")
        places.append(("twin_" if twin else "", clip, frame))
    pictures, coefficients = (
        np.stack([store.get(clip, version + name)[frame] for version, clip, frame in places])
        for name in ("frames", "coefficients")
    )
    return to_unit(pictures[:, None], device)[:, :, 0], torch.from_numpy(coefficients).float().to(device)


def sample_coefficients(draw: Draw, coefficients: Tensor, count: int) -> Tensor:
    """[B, 52] -> [B + count, 52]: more, each with a few actions of any strength, as a user's file may have."""
    shape = (count, coefficients.shape[1])
    amounts = draw.uniform(shape, coefficients.device)
    active = draw.uniform(shape, coefficients.device) < draw.uniform((count, 1), coefficients.device) ** 2
    return torch.cat([coefficients, amounts * active])


def expression_loss(
    nets: nn.ModuleDict, draw: Draw, images: Tensor, coefficients: Tensor, basis: CodeBasis
) -> tuple[Tensor, Metrics]:
    """Regression of the code by both networks, from pictures of which half are mirrored."""
    mirror = draw.uniform((len(images),), images.device) < 0.5
    images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
    coefficients = torch.where(mirror[:, None], coefficients[:, MIRROR], coefficients)
    seen = F.mse_loss(nets["encoder"](jitter(images, draw)).float(), basis.code(coefficients))
    many = sample_coefficients(draw, coefficients, 4 * len(coefficients))
    mapped = F.mse_loss(nets["arkit"](many).float(), basis.code(many))
    return seen + mapped, {"encoder_mse": seen.item(), "arkit_mse": mapped.item()}


@torch.no_grad()
def validate(nets: nn.ModuleDict, store: ClipStore, basis: CodeBasis, device: torch.device) -> Metrics:
    """Share of the code's variance that the encoder explains on unseen people, and errors of coefficients."""
    images, coefficients = sample_images(store, Draw(0, "validate", 0, 0), 192, device)
    code, target = nets["encoder"](images).float(), basis.code(coefficients)
    mapped = nets["arkit"](coefficients).float()
    variance = (target - target.mean(0)).square().mean()
    return {
        "val_explained": float(1 - (code - target).square().mean() / variance),
        "val_jaw_error": float((basis.coefficients(code) - coefficients)[:, JAW].abs().mean()),
        "val_coefficient_error": float((basis.coefficients(code) - coefficients).abs().mean()),
        "val_arkit_mse": float(F.mse_loss(mapped, target)),
    }
