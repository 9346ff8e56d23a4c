"""Z-buffer rasteriser in Warp for the CPU: an RGB frame, and the normal map of the neutral mesh in the same pose.

Cameras: K [3, 3] in pixels (pixel centres at +0.5), c2w [4, 4] OpenCV (x right, y down, z forward), both float64.
Normal maps: camera space with x right, y up, z to the viewer, RGB = (n + 1) / 2, background black.
A launch on the CPU runs its threads one after another, so the z-buffer needs no atomics.
"""

from __future__ import annotations

import numpy as np
import warp as wp

from demo.world.appearance import TEXTURE_BOTTOM, TEXTURE_TOP, Appearance
from demo.world.head import MATERIALS, HeadModel, load_basis

wp.config.quiet = True
SUPERSAMPLING = 2
SKIN, MOUTH, EYE_LEFT, EYE_RIGHT, TEETH, TONGUE, LASHES = (wp.constant(k) for k in range(len(MATERIALS)))
_TOP, _BOTTOM = wp.constant(TEXTURE_TOP), wp.constant(TEXTURE_BOTTOM)


@wp.kernel(enable_backward=False)
def accumulate_normals(
    vertices: wp.array(dtype=wp.vec3), faces: wp.array2d(dtype=wp.int32), normals: wp.array(dtype=wp.vec3)
):
    f = wp.tid()
    i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
    a = vertices[i]
    n = wp.cross(vertices[j] - a, vertices[k] - a)
    normals[i] = normals[i] + n
    normals[j] = normals[j] + n
    normals[k] = normals[k] + n


@wp.kernel(enable_backward=False)
def project(
    vertices: wp.array(dtype=wp.vec3),
    w2c: wp.mat33,
    origin: wp.vec3,
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    screen: wp.array(dtype=wp.vec3),
    normals: wp.array(dtype=wp.vec3),
):
    v = wp.tid()
    p = w2c @ (vertices[v] - origin)
    z = wp.max(p[2], 0.01)
    screen[v] = wp.vec3(fx * p[0] / z + cx, fy * p[1] / z + cy, 1.0 / z)
    normals[v] = wp.normalize(normals[v])


@wp.kernel(enable_backward=False)
def rasterise(
    screen: wp.array(dtype=wp.vec3),
    faces: wp.array2d(dtype=wp.int32),
    two_sided: wp.array(dtype=wp.uint8),
    width: int,
    height: int,
    depth: wp.array2d(dtype=wp.float32),
    owner: wp.array2d(dtype=wp.int32),
):
    f = wp.tid()
    a, b, c = screen[faces[f, 0]], screen[faces[f, 1]], screen[faces[f, 2]]
    area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    if area > 0.0 and two_sided[f] == wp.uint8(0):  # y points down: faces towards the camera have negative area
        return
    if wp.abs(area) < 1.0e-9:
        return
    x0 = wp.max(int(wp.floor(wp.min(wp.min(a[0], b[0]), c[0]) + 0.5)), 0)
    x1 = wp.min(int(wp.floor(wp.max(wp.max(a[0], b[0]), c[0]) - 0.5)), width - 1)
    y0 = wp.max(int(wp.floor(wp.min(wp.min(a[1], b[1]), c[1]) + 0.5)), 0)
    y1 = wp.min(int(wp.floor(wp.max(wp.max(a[1], b[1]), c[1]) - 0.5)), height - 1)
    inverse = 1.0 / area
    for y in range(y0, y1 + 1):
        py = float(y) + 0.5
        for x in range(x0, x1 + 1):
            px = float(x) + 0.5
            wb = ((px - a[0]) * (c[1] - a[1]) - (py - a[1]) * (c[0] - a[0])) * inverse
            wc = ((b[0] - a[0]) * (py - a[1]) - (b[1] - a[1]) * (px - a[0])) * inverse
            wa = 1.0 - wb - wc
            if wa >= 0.0 and wb >= 0.0 and wc >= 0.0:
                d = wa * a[2] + wb * b[2] + wc * c[2]
                if d > depth[y, x]:
                    depth[y, x] = d
                    owner[y, x] = f


@wp.func
def barycentric(screen: wp.array(dtype=wp.vec3), i: int, j: int, k: int, px: float, py: float):
    """Perspective-correct weights of the three corners."""
    a, b, c = screen[i], screen[j], screen[k]
    area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    wb = ((px - a[0]) * (c[1] - a[1]) - (py - a[1]) * (c[0] - a[0])) / area
    wc = ((b[0] - a[0]) * (py - a[1]) - (b[1] - a[1]) * (px - a[0])) / area
    wa = (1.0 - wb - wc) * a[2]
    wb = wb * b[2]
    wc = wc * c[2]
    return wp.vec3(wa, wb, wc) / (wa + wb + wc)


@wp.kernel(enable_backward=False)
def shade_normals(
    screen: wp.array(dtype=wp.vec3),
    normals: wp.array(dtype=wp.vec3),
    faces: wp.array2d(dtype=wp.int32),
    w2c: wp.mat33,
    owner: wp.array2d(dtype=wp.int32),
    out: wp.array3d(dtype=wp.uint8),
):
    y, x = wp.tid()
    f = owner[y, x]
    if f < 0:
        for c in range(3):
            out[y, x, c] = wp.uint8(0)
        return
    i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
    w = barycentric(screen, i, j, k, float(x) + 0.5, float(y) + 0.5)
    n = w2c @ wp.normalize(w[0] * normals[i] + w[1] * normals[j] + w[2] * normals[k])
    out[y, x, 0] = wp.uint8(127.5 * (1.0 + n[0]) + 0.5)
    out[y, x, 1] = wp.uint8(127.5 * (1.0 - n[1]) + 0.5)
    out[y, x, 2] = wp.uint8(127.5 * (1.0 - n[2]) + 0.5)


@wp.func
def texel(texture: wp.array3d(dtype=wp.uint8), row: int, column: int):
    return wp.vec4(
        float(texture[row, column, 0]),
        float(texture[row, column, 1]),
        float(texture[row, column, 2]),
        float(texture[row, column, 3]),
    )


@wp.func
def sample(texture: wp.array3d(dtype=wp.uint8), u: float, v: float):
    """Bilinear; u wraps, v clamps; both in texels with centres at +0.5. Values 0..1."""
    rows, columns = texture.shape[0], texture.shape[1]
    u = u - 0.5
    v = wp.clamp(v - 0.5, 0.0, float(rows) - 1.001)
    c0 = int(wp.floor(u))
    r0 = int(v)
    fu = u - float(c0)
    fv = v - float(r0)
    c0 = (c0 + columns) % columns
    c1 = (c0 + 1) % columns
    top = texel(texture, r0, c0) * (1.0 - fu) + texel(texture, r0, c1) * fu
    low = texel(texture, r0 + 1, c0) * (1.0 - fu) + texel(texture, r0 + 1, c1) * fu
    return (top * (1.0 - fv) + low * fv) * (1.0 / 255.0)


@wp.struct
class Look:
    """Uniforms of one clip; colours are linear."""

    key_direction: wp.vec3
    key_colour: wp.vec3
    fill_direction: wp.vec3
    fill_colour: wp.vec3
    sky: wp.vec3
    ground: wp.vec3
    iris_colour: wp.vec3
    sclera_colour: wp.vec3
    lash_colour: wp.vec3
    iris_radius: float
    pupil_radius: float
    gloss: float
    background_top: wp.vec3
    background_bottom: wp.vec3


@wp.func
def smooth(low: float, high: float, x: float):
    t = wp.clamp((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@wp.kernel(enable_backward=False)
def shade(
    screen: wp.array(dtype=wp.vec3),
    vertices: wp.array(dtype=wp.vec3),
    normals: wp.array(dtype=wp.vec3),
    rest: wp.array(dtype=wp.vec3),
    occlusion: wp.array(dtype=wp.float32),
    faces: wp.array2d(dtype=wp.int32),
    material: wp.array(dtype=wp.uint8),
    texture: wp.array3d(dtype=wp.uint8),
    look: Look,
    eye: wp.vec3,
    samples: int,
    owner: wp.array2d(dtype=wp.int32),
    out: wp.array3d(dtype=wp.uint8),
):
    y, x = wp.tid()
    share = 1.0 / float(samples * samples)
    total = wp.vec3(0.0)
    slope = (float(y) + 0.5) / float(out.shape[0])
    back = look.background_top * (1.0 - slope) + look.background_bottom * slope
    for s in range(samples * samples):
        sy = y * samples + s // samples
        sx = x * samples + s % samples
        f = owner[sy, sx]
        if f < 0:
            total = total + back * share
        else:
            i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
            w = barycentric(screen, i, j, k, float(sx) + 0.5, float(sy) + 0.5)
            n = wp.normalize(w[0] * normals[i] + w[1] * normals[j] + w[2] * normals[k])
            p = w[0] * vertices[i] + w[1] * vertices[j] + w[2] * vertices[k]
            t = w[0] * rest[i] + w[1] * rest[j] + w[2] * rest[k]
            sky = w[0] * occlusion[i] + w[1] * occlusion[j] + w[2] * occlusion[k]
            view = wp.normalize(eye - p)
            half_way = wp.normalize(view + look.key_direction)
            kind = int(material[f])
            albedo = wp.vec3(0.0)
            shine = wp.float32(0.0)
            glint = wp.vec3(0.0)
            soft = wp.float32(0.25)
            if kind == SKIN:
                u = (wp.atan2(t[0], t[2]) * 0.15915494 + 0.5) * float(texture.shape[1])
                v = (_TOP - t[1]) / (_TOP - _BOTTOM) * float(texture.shape[0])
                colour = sample(texture, u, v)
                albedo = wp.vec3(colour[0] * colour[0], colour[1] * colour[1], colour[2] * colour[2])
                shine = colour[3] * look.gloss
                spot = wp.max(wp.dot(n, half_way), 0.0)
                spot = spot * spot
                spot = spot * spot
                spot = spot * spot
                glint = look.key_colour * (shine * (spot * spot) * 1.6 + 0.25 * shine * spot)
                facing = 1.0 - wp.max(wp.dot(n, view), 0.0)
                glint = glint + look.sky * (shine * 0.5 * facing * facing * facing)
            elif kind == EYE_LEFT or kind == EYE_RIGHT:
                e = wp.normalize(t)
                rho = wp.sqrt(e[0] * e[0] + e[1] * e[1])
                if e[2] < 0.0:
                    rho = 1.0
                ring = look.iris_radius
                iris = look.iris_colour * (0.55 + 0.75 * smooth(look.pupil_radius, ring, rho))
                iris = iris * (1.0 - 0.75 * smooth(0.80 * ring, ring, rho))
                iris = iris * smooth(look.pupil_radius - 0.035, look.pupil_radius + 0.035, rho)
                mask = smooth(ring - 0.03, ring + 0.03, rho)
                albedo = iris * (1.0 - mask) + look.sclera_colour * mask
                soft = 0.6
                sky = 0.45 + 0.55 * sky
                spot = wp.max(wp.dot(n, half_way), 0.0)
                glint = look.key_colour * (0.9 * wp.pow(spot, 90.0))
            elif kind == TEETH:
                albedo = wp.vec3(0.80, 0.76, 0.68)
                sky = smooth(0.045, 0.085, t[2]) * 0.85
                soft = 0.5
            elif kind == TONGUE:
                albedo = wp.vec3(0.50, 0.13, 0.13)
                sky = smooth(0.045, 0.098, t[2]) * 0.7
                soft = 0.4
            elif kind == MOUTH:
                albedo = wp.vec3(0.26, 0.035, 0.03)
                sky = 0.03 + smooth(0.06, 0.105, t[2]) * 0.5
            else:
                albedo = look.lash_colour
                sky = 0.7
            lit = wp.max((wp.dot(n, look.key_direction) + soft) / (1.0 + soft), 0.0)
            fill = wp.max(wp.dot(n, look.fill_direction) * 0.7 + 0.3, 0.0)
            up = 0.5 + 0.5 * n[1]
            direct = smooth(0.0, 0.55, sky)
            light = look.key_colour * (lit * direct) + look.fill_colour * (fill * (0.25 + 0.75 * sky))
            light = light + (look.sky * up + look.ground * (1.0 - up)) * (0.15 + 0.85 * sky)
            value = wp.cw_mul(albedo, light) + glint * direct
            for c in range(3):
                value[c] = wp.min(value[c], 1.6)
            value = wp.vec3(
                value[0] * (1.0 - 0.12 * value[0]),
                value[1] * (1.0 - 0.12 * value[1]),
                value[2] * (1.0 - 0.12 * value[2]),
            )
            total = total + value * share
    for c in range(3):
        out[y, x, c] = wp.uint8(255.0 * wp.sqrt(wp.clamp(total[c], 0.0, 1.0)) + 0.5)


class Renderer:
    """Renders one person at a time at one size; buffers are allocated once."""

    def __init__(self, height: int, width: int, samples: int = SUPERSAMPLING):
        wp.init()
        basis = load_basis()
        self.height, self.width, self.samples = height, width, samples
        count = basis.num_vertices
        kinds = basis.material
        shape_kinds = [MATERIALS.index(name) for name in ("skin", "mouth", "eye_left", "eye_right")]
        two_sided = np.isin(kinds, [MATERIALS.index(name) for name in ("teeth", "tongue", "lashes")])

        def array(values: np.ndarray, dtype) -> wp.array:
            return wp.array(np.ascontiguousarray(values), dtype=dtype, device="cpu")

        self._faces = array(basis.faces, wp.int32)
        self._kinds = array(kinds, wp.uint8)
        self._two_sided = array(two_sided, wp.uint8)
        self._shape_faces = array(basis.faces[np.isin(kinds, shape_kinds)], wp.int32)
        self._vertices, self._normals, self._screen, self._template = (
            wp.zeros(count, dtype=wp.vec3, device="cpu") for _ in range(4)
        )
        self._occlusion = wp.zeros(count, dtype=float, device="cpu")
        self._big = self._buffers(height * samples, width * samples)
        self._small = self._buffers(height, width)
        self._out = wp.zeros((height, width, 3), dtype=wp.uint8, device="cpu")
        self._texture = None
        self._look = Look()
        self._appearance: Appearance | None = None

    @staticmethod
    def _buffers(height: int, width: int) -> tuple[wp.array, wp.array]:
        return (
            wp.zeros((height, width), dtype=float, device="cpu"),
            wp.zeros((height, width), dtype=wp.int32, device="cpu"),
        )

    def set_appearance(self, appearance: Appearance) -> None:
        """Upload the textures and lights of one clip."""
        self._appearance = appearance
        self._texture = wp.array(appearance.texture, dtype=wp.uint8, device="cpu")
        self._template.numpy()[:] = appearance.template
        self._occlusion.numpy()[:] = appearance.occlusion
        for name, value in appearance.look.items():
            setattr(self._look, name, wp.vec3(*map(float, value)) if np.ndim(value) else float(value))

    def _prepare(self, vertices, faces, K, c2w, scale, buffers, two_sided) -> wp.mat33:
        self._vertices.numpy()[:] = vertices
        self._normals.zero_()
        wp.launch(accumulate_normals, faces.shape[0], inputs=[self._vertices, faces, self._normals], device="cpu")
        rotation = np.asarray(c2w, np.float64)[:3, :3]
        w2c = wp.mat33(*map(float, rotation.T.ravel()))
        origin = wp.vec3(*map(float, c2w[:3, 3]))
        wp.launch(
            project,
            len(vertices),
            inputs=[
                self._vertices, w2c, origin, float(K[0, 0] * scale), float(K[1, 1] * scale), float(K[0, 2] * scale),
                float(K[1, 2] * scale), self._screen, self._normals,
            ],
            device="cpu",
        )  # fmt: skip
        depth, owner = buffers
        depth.zero_()
        owner.fill_(-1)
        height, width = depth.shape
        wp.launch(
            rasterise,
            faces.shape[0],
            inputs=[self._screen, faces, two_sided, width, height, depth, owner],
            device="cpu",
        )
        return w2c

    def normals(self, vertices: np.ndarray, K: np.ndarray, c2w: np.ndarray) -> np.ndarray:
        """vertices [V, 3] of a neutral face, camera -> normal map uint8 [H, W, 3]."""
        w2c = self._prepare(vertices, self._shape_faces, K, c2w, 1, self._small, self._two_sided)
        wp.launch(
            shade_normals,
            (self.height, self.width),
            inputs=[self._screen, self._normals, self._shape_faces, w2c, self._small[1], self._out],
            device="cpu",
        )
        return self._out.numpy().copy()

    def rgb(self, vertices: np.ndarray, K: np.ndarray, c2w: np.ndarray) -> np.ndarray:
        """vertices [V, 3] (with the hair's volume, see Appearance.thicken), camera -> frame uint8 [H, W, 3]."""
        self._prepare(vertices, self._faces, K, c2w, self.samples, self._big, self._two_sided)
        wp.launch(
            shade,
            (self.height, self.width),
            inputs=[
                self._screen, self._vertices, self._normals, self._template, self._occlusion, self._faces, self._kinds,
                self._texture, self._look, wp.vec3(*map(float, c2w[:3, 3])), self.samples, self._big[1], self._out,
            ],
            device="cpu",
        )  # fmt: skip
        return self._out.numpy().copy()

    def picture(
        self, head: HeadModel, coefficients: np.ndarray, rotation: np.ndarray, translation: np.ndarray,
        K: np.ndarray, c2w: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """One frame: coefficients [52], head rotation [3, 3], translation [3], camera -> RGB [H, W, 3]."""
        expressive = head.move(head.expression(coefficients) + self._appearance.hair_offset, rotation, translation)
        return self.rgb(expressive, K, c2w)

    def pair(
        self, head: HeadModel, coefficients: np.ndarray, rotation: np.ndarray, translation: np.ndarray,
        K: np.ndarray, c2w: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """The same -> RGB, normal map of the neutral face [H, W, 3]."""
        rgb = self.picture(head, coefficients, rotation, translation, K, c2w)
        return rgb, self.normals(head.neutral(rotation, translation), K, c2w)
