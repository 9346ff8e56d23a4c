import ctypes
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from media_files import frontal, one_line, sphere, write_video

from factorportrait.errors import MediaError, UserError
from factorportrait.runtime.media import normals
from factorportrait.runtime.media.camera import open_camera
from factorportrait.runtime.media.mesh import MeshNpz, PosedHead, open_mesh, read_obj
from factorportrait.runtime.media.normals import NormalRenderer, NormalVideo

SIZE = 96
K0 = np.array([[200.0, 0, 48], [0, 200, 48], [0, 0, 1]])


@pytest.fixture(scope="module")
def ball():
    return sphere(128, 192)


@pytest.fixture(scope="module")
def renderer():
    pytest.importorskip("warp")
    return NormalRenderer(SIZE, SIZE)


def sphere_normals(K, c2w, radius=0.1):
    """Analytic normals of a sphere at the origin, in the camera axes of DESIGN.md: ([H,W,3], hit [H,W])."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(K).T @ c2w[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    origin = c2w[:3, 3]
    b = rays @ origin
    root = b**2 - origin @ origin + radius**2
    hit = root > 0
    points = origin + rays * (-b - np.sqrt(np.maximum(root, 0)))[..., None]
    return points / radius @ c2w[:3, :3] * [1, -1, -1], hit


@pytest.mark.parametrize("principal", [(48, 48), (20.5, 70.25)])
@pytest.mark.parametrize("frame", [0, 20])
def test_sphere(renderer, ball, principal, frame):
    K = K0.copy()
    K[:2, 2] = principal
    K, c2w = (x[0] for x in vars(open_camera("orbit:40", SIZE, SIZE, K, frontal(), 24).cameras(frame, 1)).values())
    image = renderer(*ball, K, c2w)
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    expected, hit = sphere_normals(K, c2w)
    drawn = image.max(axis=-1) > 0
    assert (drawn != hit).sum() <= 0.02 * hit.sum()  # the outline of the polyhedron
    inside = hit & drawn & (expected[..., 2] > 0.3)
    error = np.abs(image[inside] / 127.5 - 1 - expected[inside])
    assert inside.sum() > 1000 and error.max() < 0.02
    assert image[~hit & ~drawn].max() == 0


def test_axes(renderer, ball):
    """Red grows to the right, green upwards, blue towards the viewer."""
    image = renderer(*ball, K0, frontal()).astype(int)
    assert image[48, 70, 0] > 180 and image[48, 26, 0] < 75
    assert image[26, 48, 1] > 180 and image[70, 48, 1] < 75
    assert image[48, 48, 2] == 255


def test_moved_vertices_equal_a_fresh_renderer(renderer, ball):
    vertices, faces = ball
    moved = (vertices * [1.2, 0.8, 1.0] + [0.03, -0.02, 0.05]).astype(np.float32)
    renderer(vertices, faces, K0, frontal())
    assert np.array_equal(renderer(moved, faces, K0, frontal()), NormalRenderer(SIZE, SIZE)(moved, faces, K0, frontal()))


def test_no_holes_between_triangles(ball):
    """A dense mesh over the whole picture, fine samples: every ray meets it."""
    pytest.importorskip("warp")
    vertices, faces = ball
    for supersample in (1, 4):
        image = NormalRenderer(SIZE, SIZE, supersample=supersample)(vertices * 12, faces, K0, frontal())
        assert image.max(axis=-1).min() > 100


def cast_rays(triangles, K, c2w):
    """float64 [N,3,3] -> nearest triangle per pixel centre, -1 for none; all pairs (Moeller and Trumbore)."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    rays = (np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(K).T @ c2w[:3, :3].T).reshape(-1, 1, 3)
    a, ab, ac = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    p = np.cross(rays, ac)
    determinant = (p * ab).sum(-1)
    away = c2w[:3, 3] - a
    u = (p * away).sum(-1) / determinant
    q = np.cross(away, ab)
    v = (q * rays).sum(-1) / determinant
    depth = (q * ac).sum(-1) / determinant
    depth[(u < 0) | (v < 0) | (u + v > 1) | (depth <= 0)] = np.inf
    return np.where(np.isfinite(depth.min(1)), depth.argmin(1), -1).reshape(SIZE, SIZE)


def test_random_triangles_around_the_camera_equal_ray_casting(renderer):
    """Many reach behind the camera or far out of the picture; each has a colour of its own by its normal."""
    rng = np.random.default_rng(0)
    c2w = frontal()
    start, along, across = (rng.normal(size=(200, 1, 3)) * size for size in (0.5, 0.8, 0.05))
    triangles = c2w[:3, 3] + np.concatenate([start, start + along, start + across], axis=1)
    triangles = triangles.astype(np.float32).astype(np.float64)
    K = np.array([[60.0, 0, 48], [0, 60, 48], [0, 0, 1]])
    expected = cast_rays(triangles, K, c2w)
    depths = (triangles - c2w[:3, 3]) @ c2w[:3, 2]
    drawn = np.unique(expected[expected >= 0])
    assert len(drawn) > 8 and (depths[drawn].min(axis=1) < 0).sum() > 3
    image = renderer(triangles.reshape(-1, 3).astype(np.float32), np.arange(600).reshape(-1, 3), K, c2w)
    flat = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    to_eye = c2w[:3, 3] - triangles[:, 0]
    flat *= np.sign((flat * to_eye).sum(-1, keepdims=True))
    colours = np.append((flat @ c2w[:3, :3] * [1, -1, -1] + 1) * 127.5, [[0, 0, 0]], axis=0)[expected]
    assert (np.abs(image - colours).max(axis=-1) > 1.5).mean() < 2e-3  # rays along an edge


def test_inverted_winding_and_another_topology(renderer, ball):
    vertices, faces = ball
    image = renderer(vertices, faces, K0, frontal())
    inverted = renderer(vertices, faces[:, ::-1], K0, frontal())
    assert (np.abs(inverted.astype(int) - image).max(axis=-1) > 1).mean() < 1e-3
    assert renderer(*sphere(8, 8), K0, frontal()).max() > 0
    behind = frontal()
    behind[2, 3] = -0.6  # looks away from the mesh
    assert renderer(vertices, faces, K0, behind).max() == 0


def test_supersampling_blends_the_outline(ball):
    pytest.importorskip("warp")
    single, fine = (NormalRenderer(SIZE, SIZE, supersample=s)(*ball, K0, frontal()).astype(int) for s in (1, 2))
    assert np.abs(single - fine)[40:56, 40:56].max() <= 1
    assert 0 < ((fine[..., 2] > 0) & (fine[..., 2] < 100)).sum() < 300
    with pytest.raises(MediaError) as error:
        NormalRenderer(8, 8, supersample=9)
    one_line(error.value, "supersampling")


def test_without_warp_or_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(UserError) as error:
        NormalRenderer(8, 8)
    one_line(error.value, 'pip install "factorportrait[mesh]"', '(in a checkout: pip install -e ".[mesh]")')
    monkeypatch.undo()
    pytest.importorskip("warp")
    with pytest.raises(UserError) as error:
        NormalRenderer(8, 8, device="cuda:77")
    one_line(error.value, "cuda:77", "cpu")


def test_imports_are_lazy_and_quiet():
    code = (
        "import sys, factorportrait.runtime.media.normals, factorportrait.runtime.media.writer;"
        "import factorportrait.runtime.media.camera, factorportrait.runtime.media.streams;"
        "print([m for m in ('torch', 'onnx', 'warp') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    pytest.importorskip("warp")
    code = "from factorportrait.runtime.media.normals import NormalRenderer; NormalRenderer(8, 8)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == ""


@pytest.mark.parametrize(("driver", "redirected"), [(True, 0), (False, 1)])
def test_stderr_is_redirected_only_without_a_driver_and_only_once(monkeypatch, driver, redirected):
    pytest.importorskip("warp")
    asked, moved = [], []

    def load(name, *args, **kwargs):
        asked.append(name)
        if not driver:
            raise OSError(name)

    real_dup2 = os.dup2
    normals._init_warp.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(os, "dup2", lambda old, new: (moved.append(new), real_dup2(old, new)))
    for _ in range(3):
        NormalRenderer(8, 8)
    assert asked == ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"]
    assert moved == [2, 2] * redirected  # away and back


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_npz(tmp_path, ball, save, dtype):
    vertices, faces = ball
    frames = np.stack([vertices * (1 + 0.01 * i) for i in range(4)]).astype(dtype)
    save(tmp_path / "m.npz", vertices=frames, faces=faces.astype(np.int64))
    mesh = open_mesh(tmp_path / "m.npz")
    assert isinstance(mesh, MeshNpz) and len(mesh) == 4 and mesh.num_vertices == len(vertices)
    assert mesh.faces.dtype == np.int32 and np.array_equal(mesh.faces, faces)
    for _ in range(2):
        assert np.array_equal(np.stack(list(mesh)), frames.astype(np.float32))
    save(tmp_path / "f.npz", vertices=np.asfortranarray(frames), faces=faces)
    assert np.array_equal(np.stack(list(open_mesh(tmp_path / "f.npz"))), frames.astype(np.float32))
    save(tmp_path / "one.npz", vertices=frames[0], faces=faces)
    assert len(open_mesh(tmp_path / "one.npz")) == 1


def test_npz_memory_is_flat(tmp_path, ball):
    vertices, faces = ball
    np.savez_compressed(tmp_path / "m.npz", vertices=np.repeat(vertices[None], 60, axis=0), faces=faces)
    mesh = open_mesh(tmp_path / "m.npz")
    tracemalloc.start()
    assert sum(1 for _ in mesh) == 60
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * vertices.nbytes


def test_npz_refusals(tmp_path, ball, caplog):
    vertices, faces = ball
    frames = np.stack([vertices, vertices])
    nan = frames.copy()
    nan[1, 7] = np.nan
    cases = [
        ({"vertices": frames}, ["'faces'"]),
        ({"vertices": frames, "faces": faces[:0]}, ["at least one triangle"]),
        ({"vertices": frames, "faces": faces + 1}, ["vertex indices"]),
        ({"vertices": frames, "faces": faces - 1}, ["vertex indices", "-1"]),
        ({"vertices": frames, "faces": np.zeros((3, 4), int)}, ["triangles"]),
        ({"vertices": frames, "faces": faces.astype(float)}, ["integers"]),
        ({"vertices": frames[..., :2], "faces": faces}, ["[T,V,3]"]),
        ({"vertices": frames.astype(int), "faces": faces}, ["floats"]),
        ({"vertices": nan, "faces": faces}, ["frame 1", "vertex 7"]),
        ({"vertices": np.array([object()]), "faces": faces}, ["floats"]),
    ]
    for arrays, words in cases:
        np.savez(tmp_path / "m.npz", **arrays)
        with pytest.raises(MediaError) as error:
            list(open_mesh(tmp_path / "m.npz"))
        one_line(error.value, "m.npz", *words)
    np.savez(tmp_path / "m.npz", vertices=frames, faces=faces)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:-2000])
    for name, words in (("cut.npz", "whole .npz"), ("no.npz", "no such file"), ("x.stl", ".obj")):
        with pytest.raises(MediaError) as error:
            open_mesh(tmp_path / name)
        one_line(error.value, words)
    np.savez(tmp_path / "cm.npz", vertices=frames * 100, faces=faces)
    open_mesh(tmp_path / "cm.npz")
    assert "metres" in caplog.text


OBJ = "# cube side\nv 0 0 0\nv 0.1 0 0\nv 0.1 0.1 0\nv 0 0.1 0\nvn 0 0 1\n"


def test_obj(tmp_path):
    for i in (0, 2, 10):
        text = OBJ.replace("v 0 0 0", f"v 0 0 {i}")
        (tmp_path / f"m{i}.obj").write_text(text + "f 1/1/1 2//1 3 4\nf -4 -3 -2\n")
    mesh = open_mesh(tmp_path)
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]] and mesh.num_frames == 3
    assert [v[0, 2] for v in mesh] == [0, 2, 10]
    assert open_mesh(tmp_path / "m2.obj").num_frames == 1
    (tmp_path / "._m0.obj").write_bytes(b"\0\5\x16\7")  # what macOS leaves on foreign disks
    assert open_mesh(tmp_path).num_frames == 3
    (tmp_path / "m3.obj").write_text(OBJ + "f 1 2 3\n")
    with pytest.raises(MediaError) as error:
        list(open_mesh(tmp_path))
    one_line(error.value, "m3.obj", "m0.obj")


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("f 1 2 3 4 1\n", ["line 7", "5 corners"]),
        ("f 1 2 0\n", ["line 7"]),
        ("f 1 2 9\n", ["indices"]),
        ("f 1 2 x\n", ["line 7"]),
        ("v 1 2\n", ["line 7"]),
        ("v 1 2 nan\nf 1 2 3\n", ["vertex 4"]),
        ("", ["at least one triangle"]),
    ],
)
def test_obj_refusals(tmp_path, tail, words):
    (tmp_path / "m.obj").write_text(OBJ + tail)
    with pytest.raises(MediaError) as error:
        read_obj(tmp_path / "m.obj")
    one_line(error.value, "m.obj", *words)


def test_posed_head(tmp_path, ball):
    vertices, faces = ball
    weights = (vertices[:, 1] > 0).astype(np.float32)
    arrays = {"vertices": vertices, "faces": faces, "weights": weights, "pivot": np.array([0, -0.05, 0])}
    np.savez(tmp_path / "head.npz", **arrays)
    head = PosedHead(tmp_path / "head.npz")
    assert head.vertices(np.eye(3)) == pytest.approx(vertices)
    turn = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # a quarter to the subject's left
    posed = head.vertices(turn, [0, 0.01, 0])
    still = weights == 0
    assert np.array_equal(posed[still], vertices[still])
    assert posed[~still] == pytest.approx(vertices[~still] @ turn.T + [0, 0.01, 0], abs=1e-6)
    assert posed.dtype == np.float32 and head.faces.shape == faces.shape
    for change, words in (
        ({"weights": weights * 2}, "0..1"),
        ({"pivot": np.zeros(2)}, "3 numbers"),
        ({"weights": None}, "'weights'"),
    ):
        np.savez(tmp_path / "bad.npz", **{k: v for k, v in (arrays | change).items() if v is not None})
        with pytest.raises(MediaError) as error:
            PosedHead(tmp_path / "bad.npz")
        one_line(error.value, "bad.npz", words)


def test_normal_video(tmp_path, renderer, ball):
    image = renderer(*ball, K0, frontal())
    video = NormalVideo(write_video(tmp_path / "n.mp4", [image] * 5), 64, 64)
    frames = list(video)
    assert (video.num_frames, video.fps, len(frames)) == (5, 25, 5) and frames[0].shape == (64, 64, 3)
    assert np.abs(frames[0][32, 32].astype(int) - image[48, 48]).max() < 12 and frames[0][0, 0].max() < 12
    for frame in (np.zeros_like(image), np.full_like(image, 250)):
        with pytest.raises(MediaError) as error:
            NormalVideo(write_video(tmp_path / "x.mp4", [frame] * 3), 64, 64)
        one_line(error.value, "x.mp4", "normal")
