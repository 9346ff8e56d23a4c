"""Warp kernels of the normal renderer. Imported only when a mesh is rendered."""

from __future__ import annotations

import warp as wp


@wp.kernel
def vertex_normals(
    points: wp.array(dtype=wp.vec3),
    faces: wp.array(dtype=wp.int32),
    first: wp.array(dtype=wp.int32),
    incident: wp.array(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3),
):
    """Area-weighted unit normals [V]: vertex v sums its triangles incident[first[v]:first[v+1]] in a fixed order."""
    v = wp.tid()
    total = wp.vec3(0.0, 0.0, 0.0)
    for i in range(first[v], first[v + 1]):
        face = incident[i]
        a = points[faces[3 * face]]
        b = points[faces[3 * face + 1]]
        c = points[faces[3 * face + 2]]
        total += wp.cross(b - a, c - a)
    normals[v] = wp.normalize(total)


@wp.kernel
def render_normals(
    mesh: wp.uint64,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3),
    pixel_to_world: wp.mat33,
    world_to_camera: wp.mat33,
    origin: wp.vec3,
    supersample: wp.int32,
    image: wp.array3d(dtype=wp.uint8),
):
    """One thread per pixel: mean colour of supersample x supersample rays through its cells -> image [H,W,3]."""
    row, column = wp.tid()
    colour = wp.vec3(0.0, 0.0, 0.0)
    for i in range(supersample):
        for j in range(supersample):
            x = float(column) + (float(j) + 0.5) / float(supersample)
            y = float(row) + (float(i) + 0.5) / float(supersample)
            ray = wp.normalize(pixel_to_world * wp.vec3(x, y, 1.0))
            hit = wp.mesh_query_ray(mesh, origin, ray, 1.0e6)
            if hit.result:
                a = faces[3 * hit.face]
                b = faces[3 * hit.face + 1]
                c = faces[3 * hit.face + 2]
                n = normals[a] * hit.u + normals[b] * hit.v + normals[c] * (1.0 - hit.u - hit.v)
                # A surface seen from behind (open necks, inverted winding) shows its near side.
                if wp.dot(hit.normal, ray) > 0.0:
                    n = -n
                n = wp.normalize(world_to_camera * n)
                # OpenCV axes (y down, z forward) -> y up, z to the viewer.
                colour += wp.vec3(n[0] + 1.0, 1.0 - n[1], 1.0 - n[2]) * 0.5
    scale = 255.0 / float(supersample * supersample)
    for channel in range(3):
        image[row, column, channel] = wp.uint8(wp.clamp(colour[channel] * scale + 0.5, 0.0, 255.0))
