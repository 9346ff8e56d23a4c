"""Warp kernels of the normal renderer: a depth buffer of rays. Imported only when a mesh is rendered.

A ray d from the camera's centre meets a triangle a, b, c (in camera space) where d·(b×c), d·(c×a) and d·(a×b) have one sign; these
are the barycentric weights times their sum, and a·(b×c) over that sum is how far along the ray. Neighbours compute the same
products for the edge that they share, so no ray slips between them, and nothing has to be clipped.
"""

from __future__ import annotations

import warp as wp

EMPTY = wp.constant(wp.int64(2**63 - 1))
_FACE_BITS = wp.constant(wp.int64(2**32))
_NEAR = wp.constant(1.0e-6)  # metres; a triangle that comes nearer is tried for the whole picture
_MARGIN = wp.constant(0.01)  # of a sample, for the rounding of projections


@wp.kernel
def vertex_normals(
    points: wp.array(dtype=wp.vec3),
    faces: wp.array(dtype=wp.int32),
    first: wp.array(dtype=wp.int32),
    incident: wp.array(dtype=wp.int32),
    world_to_camera: wp.mat33,
    origin: wp.vec3,
    normals: wp.array(dtype=wp.vec3),
    seen: wp.array(dtype=wp.vec3),
):
    """Area-weighted unit normals [V] and the vertices [V], both in the camera's axes.

    Vertex v sums its triangles incident[first[v]:first[v+1]] in a fixed order.
    """
    v = wp.tid()
    total = wp.vec3(0.0, 0.0, 0.0)
    for i in range(first[v], first[v + 1]):
        face = incident[i]
        a = points[faces[3 * face]]
        b = points[faces[3 * face + 1]]
        c = points[faces[3 * face + 2]]
        total += wp.cross(b - a, c - a)
    normals[v] = world_to_camera * wp.normalize(total)
    seen[v] = world_to_camera * (points[v] - origin)


@wp.func
def sample(row: wp.int32, column: wp.int32, supersample: wp.int32) -> wp.vec3:
    """Pixel coordinates of a sample's centre, homogeneous."""
    return wp.vec3((float(column) + 0.5) / float(supersample), (float(row) + 0.5) / float(supersample), 1.0)


@wp.kernel
def nearest_faces(
    points: wp.array(dtype=wp.vec3),
    faces: wp.array(dtype=wp.int32),
    camera_to_pixel: wp.mat33,
    pixel_to_camera: wp.mat33,
    supersample: wp.int32,
    nearest: wp.array2d(dtype=wp.int64),
):
    """One thread per triangle: depth and number of the nearest -> nearest [H*supersample, W*supersample], which begins `EMPTY`."""
    face = wp.tid()
    a = points[faces[3 * face]]
    b = points[faces[3 * face + 1]]
    c = points[faces[3 * face + 2]]
    top = wp.int32(0)
    left = wp.int32(0)
    bottom = nearest.shape[0] - 1
    right = nearest.shape[1] - 1
    if wp.max(a[2], wp.max(b[2], c[2])) < _NEAR:
        return
    if wp.min(a[2], wp.min(b[2], c[2])) > _NEAR:
        pa = camera_to_pixel * a / a[2]
        pb = camera_to_pixel * b / b[2]
        pc = camera_to_pixel * c / c[2]
        scale = float(supersample)
        low = wp.min(pa, wp.min(pb, pc)) * scale
        high = wp.max(pa, wp.max(pb, pc)) * scale
        # Clamped as floats: a far projection does not fit an integer.
        left = int(wp.ceil(wp.clamp(low[0] - 0.5 - _MARGIN, 0.0, float(right + 1))))
        top = int(wp.ceil(wp.clamp(low[1] - 0.5 - _MARGIN, 0.0, float(bottom + 1))))
        right = int(wp.floor(wp.clamp(high[0] - 0.5 + _MARGIN, -1.0, float(right))))
        bottom = int(wp.floor(wp.clamp(high[1] - 0.5 + _MARGIN, -1.0, float(bottom))))
    # d·x of a ray d = M p through the pixel p is p·(Mᵀ x).
    pixel_to_camera_t = wp.transpose(pixel_to_camera)
    bc = pixel_to_camera_t * wp.cross(b, c)
    ca = pixel_to_camera_t * wp.cross(c, a)
    ab = pixel_to_camera_t * wp.cross(a, b)
    volume = wp.dot(a, wp.cross(b, c))
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            p = sample(row, column, supersample)
            u = wp.dot(p, bc)
            v = wp.dot(p, ca)
            w = wp.dot(p, ab)
            inside = (u >= 0.0 and v >= 0.0 and w >= 0.0) or (u <= 0.0 and v <= 0.0 and w <= 0.0)
            total = u + v + w
            if inside and total != 0.0:
                depth = volume / total
                if depth > 0.0:
                    # The bits of positive floats are ordered as the floats are.
                    key = wp.int64(wp.cast(depth, wp.int32)) * _FACE_BITS + wp.int64(face)
                    wp.atomic_min(nearest, row, column, key)


@wp.kernel
def shade(
    points: wp.array(dtype=wp.vec3),
    faces: wp.array(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3),
    pixel_to_camera: wp.mat33,
    supersample: wp.int32,
    nearest: wp.array2d(dtype=wp.int64),
    image: wp.array3d(dtype=wp.uint8),
):
    """One thread per pixel: mean colour of its supersample x supersample rays -> image [H,W,3]."""
    row, column = wp.tid()
    colour = wp.vec3(0.0, 0.0, 0.0)
    for i in range(supersample):
        for j in range(supersample):
            y = row * supersample + i
            x = column * supersample + j
            key = nearest[y, x]
            if key != EMPTY:
                face = int(key % _FACE_BITS)
                ia = faces[3 * face]
                ib = faces[3 * face + 1]
                ic = faces[3 * face + 2]
                a = points[ia]
                b = points[ib]
                c = points[ic]
                d = pixel_to_camera * sample(y, x, supersample)
                u = wp.dot(d, wp.cross(b, c))
                v = wp.dot(d, wp.cross(c, a))
                w = wp.dot(d, wp.cross(a, b))
                # Their sum is d times the triangle's own normal: positive where its back is seen (open necks, inverted
                # winding), negative where its front is. Divided by nothing, the near side shows either way.
                n = -wp.normalize(u * normals[ia] + v * normals[ib] + w * normals[ic])
                # OpenCV axes (y down, z forward) -> y up, z to the viewer.
                colour += wp.vec3(n[0] + 1.0, 1.0 - n[1], 1.0 - n[2]) * 0.5
    scale = 255.0 / float(supersample * supersample)
    for channel in range(3):
        image[row, column, channel] = wp.uint8(wp.clamp(colour[channel] * scale + 0.5, 0.0, 255.0))
