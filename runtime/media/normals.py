"""Normal maps of the posed neutral head: rendered from a mesh, or read from a video that somebody has rendered."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from factorportrait.errors import MediaError, UserError
from factorportrait.runtime.media.driving import VideoSource
from factorportrait.runtime.media.fit import Fit
from factorportrait.runtime.media.mesh import check_faces, check_vertices


class NormalRenderer:
    """Camera-space normals of a mesh by a depth buffer of rays with NVIDIA Warp, the same code for CPU and CUDA.

    Colours: RGB = (n + 1) / 2 with x right, y up, z to the viewer; background black. Smooth, area-weighted vertex
    normals; surfaces seen from behind show their near side. `supersample` 2 averages 2x2 rays per pixel (colours, so
    outlines blend with black); 1 casts one ray through the pixel's centre.
    Which triangles meet in a vertex is found once per topology.

    Raises:
        UserError: warp is not installed, or has no such device.
    """

    def __init__(self, height: int, width: int, device: str = "cpu", supersample: int = 1):
        if supersample not in (1, 2, 3, 4):
            raise MediaError("supersampling", expected="1, 2, 3 or 4", found=str(supersample), action="use 2")
        try:
            import warp as wp
        except ImportError as error:
            raise UserError(
                "rendering a mesh needs NVIDIA Warp",
                found="no package warp-lang",
                action='run: pip install "factorportrait[mesh]" (in a checkout: pip install -e ".[mesh]")',
            ) from error
        _init_warp()
        try:
            self._device = wp.get_device(device)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"no device {device!r} to render meshes",
                expected="one of " + ", ".join(str(d) for d in wp.get_devices()),
                action="use cpu",
            ) from error
        from factorportrait.runtime.media import normal_kernels

        self.height, self.width, self.supersample = height, width, supersample
        self._wp, self._kernels = wp, normal_kernels
        self._faces: np.ndarray | None = None
        samples = height * supersample, width * supersample
        self._nearest = wp.empty(samples, dtype=wp.int64, device=self._device)
        self._image = wp.empty((height, width, 3), dtype=wp.uint8, device=self._device)

    def __call__(self, vertices: np.ndarray, faces: np.ndarray, K: np.ndarray, c2w: np.ndarray) -> np.ndarray:
        """Mesh [V,3], [F,3] in metres in head space, K [3,3] in pixels of the output, c2w [4,4] -> uint8 [H,W,3].

        Raises:
            MediaError: vertices that are not finite, face indices out of range.
        """
        wp = self._wp
        vertices = check_vertices("mesh", vertices)
        if self._faces is None or len(vertices) != len(self._points) or not np.array_equal(faces, self._faces):
            self._build(vertices, check_faces("mesh", faces, len(vertices)))
        else:
            self._points.assign(vertices)
        K, c2w = np.asarray(K, np.float64), np.asarray(c2w, np.float64)
        camera_to_pixel, pixel_to_camera = (wp.mat33(*matrix.ravel().tolist()) for matrix in (K, np.linalg.inv(K)))
        mesh = [self._seen, self._indices]
        self._launch(
            self._kernels.vertex_normals, len(vertices), self._points, self._indices, self._first, self._incident,
            wp.mat33(*c2w[:3, :3].T.ravel().tolist()), wp.vec3(*c2w[:3, 3].tolist()), self._normals, self._seen,
        )  # fmt: skip
        self._nearest.fill_(self._kernels.EMPTY)
        self._launch(
            self._kernels.nearest_faces, len(self._faces), *mesh, camera_to_pixel, pixel_to_camera, self.supersample,
            self._nearest,
        )  # fmt: skip
        self._launch(
            self._kernels.shade, (self.height, self.width), *mesh, self._normals, pixel_to_camera, self.supersample,
            self._nearest, self._image,
        )  # fmt: skip
        return self._image.numpy().copy()

    def _launch(self, kernel, dim: int | tuple[int, int], *inputs) -> None:
        self._wp.launch(kernel, dim=dim, inputs=list(inputs), device=self._device)

    def _build(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        """For every vertex the list of its triangles."""
        wp = self._wp
        corners = faces.ravel()
        order = np.argsort(corners, kind="stable")
        first = np.zeros(len(vertices) + 1, np.int32)
        np.cumsum(np.bincount(corners, minlength=len(vertices)), out=first[1:])
        self._points = wp.array(vertices, dtype=wp.vec3, device=self._device)
        self._indices = wp.array(corners, dtype=wp.int32, device=self._device)
        self._first = wp.array(first, dtype=wp.int32, device=self._device)
        self._incident = wp.array((order // 3).astype(np.int32), dtype=wp.int32, device=self._device)
        self._normals, self._seen = (wp.empty(len(vertices), dtype=wp.vec3, device=self._device) for _ in range(2))
        self._faces = faces.copy()


@functools.cache
def _init_warp() -> None:
    """Start Warp, once per process, without its greetings; what a CUDA driver has to say is let through."""
    import warp as wp

    # Standard output belongs to the program. Older versions know `quiet`, newer ones `log_level`.
    if hasattr(wp.config, "log_level"):
        wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)
    else:
        wp.config.quiet = True
    with contextlib.nullcontext() if _has_cuda_driver() else _native_stderr_closed():
        wp.init()


def _has_cuda_driver() -> bool:
    """Whether the library that comes with NVIDIA's driver can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Nothing reaches file descriptor 2: without a driver Warp's library says so there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class NormalVideo:
    """A ready video of normal maps as uint8 RGB [height,width,3]. It belongs to the camera that it was rendered with.

    Fitted like every frame (see `Fit`), so the camera file of the same size stays in step. Frames are checked to be
    normal maps in the first frame: unit vectors that face the viewer.

    Attributes: fps, num_frames as in VideoSource; height, width: of the file.

    Raises:
        MediaError: what VideoSource refuses, or a first frame that is no normal map.
    """

    def __init__(
        self, path: str | os.PathLike, height: int, width: int, fps: Fraction | None = None, fit: str = "crop"
    ):
        self._video = VideoSource(path, fps)
        self.path, self.fps, self.num_frames = self._video.path, self._video.fps, self._video.num_frames
        self.height, self.width = self._video.height, self._video.width
        self._fit = Fit.between(self._video.height, self._video.width, height, width, fit)
        first = next(iter(self._video))
        covered = first.max(axis=-1) > 64
        lengths = np.linalg.norm(first[covered] / 127.5 - 1.0, axis=-1)
        if not covered.any() or abs(np.median(lengths) - 1) > 0.15:
            raise MediaError(
                f"video {path} does not look like normal maps",
                expected="RGB = (n + 1) / 2 of unit normals on black",
                found="an empty frame" if not covered.any() else f"vectors of length {np.median(lengths):.2f}",
                action="render normals in camera space, or bring mesh.npz",
            )

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._fit.apply(frame) for frame in self._video)
