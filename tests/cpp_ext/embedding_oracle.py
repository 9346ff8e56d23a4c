"""The embedding in float64 NumPy, as it is defined: rays, packed frames, concatenated channels, one convolution."""

from __future__ import annotations

import numpy as np


def oracle_rays(K: np.ndarray, c2w: np.ndarray, height: int, width: int, stride: float) -> np.ndarray:
    """K [F,3,3], c2w [F,4,4] -> [F,6,height,width] for `height` x `width` latent cells."""
    rays = np.empty((len(K), 6, height, width))
    for frame in range(len(K)):
        inverse = np.linalg.inv(K[frame])
        for y in range(height):
            for x in range(width):
                direction = c2w[frame, :3, :3] @ inverse @ [(x + 0.5) * stride, (y + 0.5) * stride, 1.0]
                direction /= np.linalg.norm(direction)
                rays[frame, :, y, x] = [*np.cross(c2w[frame, :3, 3], direction), *direction]
    return rays


def oracle_tokens(
    weight: np.ndarray, bias: np.ndarray, channels: dict[str, int], planes: dict[str, np.ndarray]
) -> np.ndarray:
    """weight [D,C,1,p,p], planes name -> [channels,N,h,w] (absent: zero) -> [N*T,D]."""
    shape = next(iter(planes.values())).shape[1:]
    stacked = np.concatenate([planes.get(name, np.zeros((count, *shape))) for name, count in channels.items()])
    size = weight.shape[-1]
    rows, columns = shape[1] // size, shape[2] // size
    tokens = np.tile(np.asarray(bias, np.float64), (shape[0] * rows * columns, 1))
    cropped = stacked[:, :, : rows * size, : columns * size]
    for y in range(size):
        for x in range(size):
            cells = cropped[:, :, y::size, x::size].reshape(len(stacked), -1)
            tokens += cells.T @ np.asarray(weight[:, :, 0, y, x], np.float64).T
    return tokens


def pack_rays(rays: np.ndarray, num_slots: int, camera_channels: int) -> np.ndarray:
    """rays [F,6,h,w] with F of 4N, 4N-3 or N -> [camera_channels,N,h,w]."""
    if len(rays) == 4 * num_slots - 3:
        rays = np.concatenate([rays[:1]] * 3 + [rays])
    if len(rays) == num_slots:
        return rays.transpose(1, 0, 2, 3)
    if camera_channels == 6:
        return rays[3::4].transpose(1, 0, 2, 3)
    return rays.reshape(num_slots, 24, *rays.shape[2:]).transpose(1, 0, 2, 3)


def portrait_cameras(
    rng: np.random.Generator, frames: int, *, shared: bool, pixels: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cameras that look at the head from all sides, with off-centre principal points and a little skew."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    K = np.tile(np.eye(3), (frames, 1, 1))
    for frame in range(frames):
        forward = rng.standard_normal(3)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, rng.standard_normal(3))
        right /= np.linalg.norm(right)
        c2w[frame, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        c2w[frame, :3, 3] = -forward * rng.uniform(0.4, 3) + rng.normal(0, 0.1, 3)
        K[frame] = [
            [pixels * rng.uniform(0.8, 4), rng.normal(0, 2), pixels * rng.uniform(-0.3, 1.3)],
            [0, 0, 0],
            [0, 0, 1],
        ]
        K[frame, 1] = [0, pixels * rng.uniform(0.8, 4), pixels * rng.uniform(-0.3, 1.3)]
    if shared:
        K[:] = K[0]
    return K, c2w
