"""Head meshes over time: `.npz` and OBJ sequences, read one frame at a time, and a head that is posed by a rotation."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from factorportrait.errors import MediaError
from factorportrait.runtime.media.fit import natural_key

log = logging.getLogger(__name__)

# A head, with or without shoulders, in metres. Anything else is probably in centimetres or millimetres.
PLAUSIBLE_EXTENT_M = (0.1, 3.0)


def open_mesh(path: str | os.PathLike) -> MeshNpz | MeshObjFolder:
    """A `.npz`, a folder of `.obj` files, or one `.obj` -> mesh sequence. MediaError when it is none of them."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".obj":
        return MeshObjFolder(path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        found = "another kind of file" if path.exists() else "no such file"
        raise MediaError(
            f"mesh {path}", expected="a .npz file or a folder of .obj files", found=found, action="check the path"
        )
    return MeshNpz(path)


class MeshNpz:
    """`vertices` [T,V,3] and `faces` [F,3] of a .npz; metres in canonical head space. Iterating gives float32 [V,3].

    Frames are read from the archive one after the other, so memory does not grow with T.

    Raises:
        MediaError: missing arrays, wrong shapes, no faces, indices out of range, values that are not finite.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        where = f"mesh {path}"
        arrays = _npz_headers(self.path, where)
        for name in ("vertices", "faces"):
            if name not in arrays:
                raise MediaError(
                    f"{where} has no {name!r}",
                    expected="arrays vertices [T,V,3] and faces [F,3]",
                    found=", ".join(arrays) or "nothing",
                    action="save it with numpy.savez(path, vertices=..., faces=...)",
                )
        shape, self._fortran, self._dtype = arrays["vertices"]
        if len(shape) == 2:
            shape = (1, *shape)
        if len(shape) != 3 or shape[2] != 3 or self._dtype.kind != "f" or 0 in shape:
            raise MediaError(
                f"{where}: vertices",
                expected="floats [T,V,3]",
                found=f"{self._dtype} {list(shape)}",
                action="save it again",
            )
        self.num_frames, self.num_vertices = shape[0], shape[1]
        with _reading(where), np.load(self.path, allow_pickle=False) as archive:
            self.faces = check_faces(where, archive["faces"], self.num_vertices)
        _warn_about_units(where, next(iter(self)))

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._fortran:
            with _reading(f"mesh {self.path}"), np.load(self.path, allow_pickle=False) as archive:
                everything = archive["vertices"].reshape(self.num_frames, self.num_vertices, 3)
            for frame_idx, vertices in enumerate(everything):
                yield check_vertices(f"mesh {self.path}, frame {frame_idx}", vertices)
            return
        frame_bytes = self.num_vertices * 3 * self._dtype.itemsize
        with _reading(f"mesh {self.path}"), zipfile.ZipFile(self.path) as archive, archive.open("vertices.npy") as file:
            _npy_header(file)
            for frame_idx in range(self.num_frames):
                data = file.read(frame_bytes)
                if len(data) < frame_bytes:
                    raise MediaError(
                        f"mesh {self.path} is cut short",
                        expected=f"{self.num_frames} frames",
                        found=str(frame_idx),
                        action="save it again",
                    )
                vertices = np.frombuffer(data, self._dtype).reshape(-1, 3)
                yield check_vertices(f"mesh {self.path}, frame {frame_idx}", vertices)


class MeshObjFolder:
    """The .obj files of a folder in natural order (or a single .obj), one topology: iterating gives float32 [V,3].

    Triangles and quads (cut along their first diagonal); normals, texture coordinates and groups are ignored.

    Raises:
        MediaError: no files, no faces, indices out of range, polygons of five or more corners, another topology later.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            files = (f for f in self.path.iterdir() if f.suffix.lower() == ".obj" and not f.name.startswith("."))
            self.files = sorted(files, key=natural_key)
        else:
            self.files = [self.path]
        if not self.files or not self.files[0].is_file():
            raise MediaError(f"mesh {path}", expected="at least one .obj file", found="none", action="check the path")
        vertices, self.faces = read_obj(self.files[0])
        self.num_frames, self.num_vertices = len(self.files), len(vertices)
        _warn_about_units(f"mesh {self.files[0]}", vertices)

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        for file in self.files:
            vertices, faces = read_obj(file)
            if len(vertices) != self.num_vertices or not np.array_equal(faces, self.faces):
                raise MediaError(
                    f"mesh {file}",
                    expected=f"{self.num_vertices} vertices, {len(self.faces)} triangles like {self.files[0].name}",
                    found=f"{len(vertices)} vertices, {len(faces)} triangles, or another order",
                    action="export all frames from the same mesh",
                )
            yield vertices


class PosedHead:
    """A neutral head that follows a rotation: for sources that bring only head angles.

    `.npz` with vertices [V,3] in metres, faces [F,3], weights [V] in 0..1 (how much a vertex follows the head; 0 at the
    shoulders) and pivot [3]. Attributes: faces int32 [F,3], num_vertices.

    Raises:
        MediaError: a missing array, a wrong shape or value.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        where = f"head {path}"
        arrays = _npz_headers(self.path, where)
        missing = [name for name in ("vertices", "faces", "weights", "pivot") if name not in arrays]
        if missing:
            raise MediaError(
                f"{where} has no {missing[0]!r}",
                expected="vertices, faces, weights and pivot",
                found=", ".join(arrays) or "nothing",
                action="take the head.npz of the bundle",
            )
        with _reading(where), np.load(self.path, allow_pickle=False) as archive:
            self._vertices = np.asarray(archive["vertices"], np.float64)
            weights, pivot = np.asarray(archive["weights"], np.float64), np.asarray(archive["pivot"], np.float64)
            faces = archive["faces"]
        check_vertices(where, self._vertices)
        if weights.shape != (len(self._vertices),) or not ((weights >= 0) & (weights <= 1)).all():
            raise MediaError(
                f"{where}: weights",
                expected=f"[{len(self._vertices)}] values in 0..1",
                found=f"{list(weights.shape)}",
                action="take the head.npz of the bundle",
            )
        if pivot.shape != (3,) or not np.isfinite(pivot).all():
            raise MediaError(
                f"{where}: pivot", expected="3 numbers", found=f"{list(pivot.shape)}", action="take the bundle's"
            )
        self.faces = check_faces(where, faces, len(self._vertices))
        self.num_vertices = len(self._vertices)
        self._weights, self._pivot = weights[:, None], pivot

    def vertices(self, rotation: np.ndarray, translation: np.ndarray | None = None) -> np.ndarray:
        """rotation [3,3] about the pivot, then translation [3] in metres, each by its weight -> float32 [V,3]."""
        moved = (self._vertices - self._pivot) @ np.asarray(rotation, np.float64).T + self._pivot
        if translation is not None:
            moved = moved + np.asarray(translation, np.float64)
        return (self._vertices + self._weights * (moved - self._vertices)).astype(np.float32)


def read_obj(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """A Wavefront .obj -> (vertices float32 [V,3], faces int32 [F,3]). MediaError naming the line."""
    vertices: list[tuple[float, float, float]] = []
    faces: list[tuple[int, int, int]] = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MediaError(f"mesh {path} cannot be read", found=str(error), action="check the file") from error
    for line_idx, line in enumerate(text.splitlines(), 1):
        key, *values = line.split() or [""]
        try:
            if key == "v":
                vertices.append((float(values[0]), float(values[1]), float(values[2])))
            elif key == "f":
                corners = [int(value.split("/")[0]) for value in values]
                if len(corners) not in (3, 4) or 0 in corners:
                    raise ValueError(f"a face with {len(corners)} corners")
                corners = [corner - 1 if corner > 0 else corner + len(vertices) for corner in corners]
                faces.append((corners[0], corners[1], corners[2]))
                if len(corners) == 4:
                    faces.append((corners[0], corners[2], corners[3]))
        except (ValueError, IndexError) as error:
            raise MediaError(
                f"mesh {path}, line {line_idx}",
                expected="'v x y z', or 'f' with 3 or 4 corners",
                found=f"{line.strip()[:40]!r} ({error})",
                action="export triangles or quads",
            ) from error
    where = f"mesh {path}"
    array = np.array(vertices, np.float32).reshape(-1, 3)
    return check_vertices(where, array), check_faces(where, np.array(faces, np.int32).reshape(-1, 3), len(array))


def check_vertices(where: str, vertices: np.ndarray) -> np.ndarray:
    """[V,3] -> float32 [V,3], finite. MediaError otherwise."""
    vertices = np.asarray(vertices)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not len(vertices):
        raise MediaError(
            f"{where}: vertices", expected="[V,3]", found=f"{list(vertices.shape)}", action="save the mesh again"
        )
    if not np.isfinite(vertices).all():
        bad = int(np.flatnonzero(~np.isfinite(vertices).all(axis=1))[0])
        raise MediaError(
            f"{where}: vertex {bad}", expected="finite numbers", found="NaN or infinity", action="repair the mesh"
        )
    return np.ascontiguousarray(vertices, np.float32)


def check_faces(where: str, faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """[F,3] -> int32 [F,3], in range, at least one. MediaError otherwise."""
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise MediaError(
            f"{where}: faces",
            expected="integers [F,3], triangles",
            found=f"{faces.dtype} {list(faces.shape)}",
            action="triangulate the mesh",
        )
    if not len(faces):
        raise MediaError(
            f"{where}: faces", expected="at least one triangle", found="none", action="export the faces too"
        )
    if faces.min() < 0 or faces.max() >= num_vertices:
        bad = int(faces.max()) if faces.max() >= num_vertices else int(faces.min())
        raise MediaError(
            f"{where}: faces",
            expected=f"vertex indices 0..{num_vertices - 1}",
            found=str(bad),
            action="export vertices and faces together",
        )
    return np.ascontiguousarray(faces, np.int32)


def _warn_about_units(where: str, vertices: np.ndarray) -> None:
    extent = float((vertices.max(axis=0) - vertices.min(axis=0)).max())
    if not PLAUSIBLE_EXTENT_M[0] <= extent <= PLAUSIBLE_EXTENT_M[1]:
        log.warning("%s is %.3g across; is it in metres?", where, extent)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """What goes wrong inside an archive -> MediaError."""
    try:
        yield
    except MediaError:
        raise
    # zipfile and numpy raise almost any exception on damaged bytes.
    except Exception as error:
        raise MediaError(
            f"{where} is not readable", expected="a whole .npz file", found=str(error), action="save it again"
        ) from error


def _npz_headers(path: Path, where: str) -> dict[str, tuple[tuple[int, ...], bool, np.dtype]]:
    """Array name -> (shape, Fortran order, dtype), without reading the arrays."""
    if not path.is_file():
        raise MediaError(where, expected="a .npz file", found="no such file", action="check the path")
    with _reading(where), zipfile.ZipFile(path) as archive:
        headers = {}
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    headers[name.removesuffix(".npy")] = _npy_header(file)
        return headers


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
