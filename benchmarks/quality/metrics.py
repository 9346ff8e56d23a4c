"""Figures of clips, all on uint8 pictures [T, H, W, 3]. A figure that does not exist for a clip is None, never 0 or NaN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from factorportrait.errors import UserError

MAX_PSNR = 100.0  # of equal clips: infinity is no number of JSON
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def psnr(pictures: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float | None:
    """dB over all pixels of the clip, or those of mask [T, H, W]; None when the mask is empty."""
    squared = np.square(pictures.astype(np.float32) - truth.astype(np.float32)).mean(-1)
    squared = squared if mask is None else squared[mask]
    if not squared.size:
        return None
    error = float(squared.mean(dtype=np.float64))
    return min(MAX_PSNR, float(10 * np.log10(255**2 / error))) if error else MAX_PSNR


def ssim(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Mean over frames of scikit-image's SSIM with the Gaussian window of Wang et al. 2004 (deviation 1.5, 11 pixels).

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError(
            "SSIM", expected="scikit-image", found="none", action="run: pip install 'factorportrait[demo]'"
        ) from error
    settings = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    scores = [
        structural_similarity(a, b, use_sample_covariance=False, **settings)
        for a, b in zip(pictures, truth, strict=True)
    ]
    return float(np.mean(scores))


def changed_mask(truth: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
    """[T, H, W] of pixels where two clips differ by more than `threshold` levels in some channel."""
    return np.abs(truth.astype(np.int16) - other).max(-1) > threshold


def interior(normals: np.ndarray, border: int) -> np.ndarray:
    """Normal maps [T, H, W, 3] -> [T, H, W] of pixels inside the head, at least `border` pixels from its outline."""
    inside = normals.any(-1)
    for _ in range(border):
        padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
        inside = (
            inside & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
        )  # fmt: skip
    return inside


def high_frequency_energy(pictures: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean square over mask [T, H, W] of luma minus luma blurred with [1 2 1]/4 both ways, in squared levels."""
    if not mask.any():
        return None
    luma = pictures.astype(np.float32) @ LUMA
    padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    return float(np.square(luma - blurred)[mask].mean(dtype=np.float64))


def sharpness(pictures: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float | None:
    """High-frequency energy as a share of the truth's: 1 is as sharp, below is blurred, above is noisy."""
    expected = high_frequency_energy(truth, mask)
    return high_frequency_energy(pictures, mask) / expected if expected else None


def jerkiness(pictures: np.ndarray) -> float:
    """Mean |second difference in time| in levels; 0 for fewer than three frames."""
    return float(np.abs(np.diff(pictures.astype(np.int16), 2, axis=0)).mean()) if len(pictures) > 2 else 0.0


def flicker(pictures: np.ndarray, truth: np.ndarray, floor: float) -> float | None:
    """Mean |second difference| as a share of the truth's; None where the truth has less than `floor` levels of it."""
    expected = jerkiness(truth)
    return jerkiness(pictures) / expected if expected > floor else None


def angles_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] -> angle between them, in degrees [...]."""
    cosine = (np.einsum("...ij,...ij->...", a, b) - 1) / 2
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def region_colours(pictures: np.ndarray, regions: dict[str, np.ndarray], min_pixels: int) -> dict[str, np.ndarray]:
    """Mean colour [3] in 8-bit levels of each region [T, H, W], over frames where it has enough pixels.

    A region that no frame shows is left out.
    """
    colours = {}
    for name, mask in regions.items():
        seen = mask & (mask.sum((1, 2)) >= min_pixels)[:, None, None]
        if seen.any():
            colours[name] = pictures[seen].mean(0, dtype=np.float64)
    return colours


def colour_errors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean |difference| in 8-bit levels of the regions that both have."""
    return {name: float(np.abs(a[name] - b[name]).mean()) for name in a if name in b}


def seam_ratio(
    pictures: np.ndarray, truth: np.ndarray, chunk_frames: int, frames_per_latent: int = 4
) -> dict[str, float | None]:
    """How wrong the change from frame to frame is at chunk borders, against elsewhere.

    Slot 1 of a stream holds one frame, later ones `frames_per_latent`; a chunk has `chunk_frames` of them. Two ratios:
    against latent-frame borders inside chunks (which are borders of the VAE too), and against every other frame.
    """
    change = np.diff(pictures.astype(np.int16), axis=0) - np.diff(truth.astype(np.int16), axis=0)
    errors = np.abs(change).mean((1, 2, 3))  # errors[t - 1]: from frame t - 1 to frame t
    starts = np.arange(1, len(errors) + 1)
    latent = (starts - 1) % frames_per_latent == 0
    slot = 1 + (starts - 1) // frames_per_latent  # 0-based slot of a frame that begins one
    chunk = latent & (slot % chunk_frames == 0)
    inside = latent & ~chunk

    def ratio(others: np.ndarray) -> float | None:
        if not chunk.any() or not others.any() or not errors[others].mean():
            return None
        return float(errors[chunk].mean() / errors[others].mean())

    return {"against_latent_borders": ratio(inside), "against_all": ratio(~chunk)}


@dataclass(frozen=True)
class Lpips:
    """LPIPS (Zhang et al. 2018, AlexNet) where its package and weights are on this machine already.

    Attributes:
        reason: why there is none; empty when there is.
    """

    model: object | None
    reason: str = ""

    @classmethod
    def load(cls) -> Lpips:
        """Never downloads anything."""
        try:
            import lpips
            import torch
            import torchvision  # noqa: F401
        except ImportError as error:
            return cls(None, f"package {error.name} is not installed (it is no dependency of factorportrait)")
        if not list((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
            return cls(None, "AlexNet's weights are not in torch's cache, and nothing is downloaded here")
        return cls(lpips.LPIPS(net="alex", verbose=False).eval())

    def __call__(self, pictures: np.ndarray, truth: np.ndarray) -> float | None:
        """Mean over frames; None without a model."""
        if self.model is None:
            return None
        import torch

        def tensor(frames: np.ndarray):
            return torch.from_numpy(np.array(frames)).movedim(-1, 1).float().div(127.5).sub(1)

        with torch.no_grad():
            return float(self.model(tensor(pictures), tensor(truth)).mean())
