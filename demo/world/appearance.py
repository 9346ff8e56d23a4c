"""Who a person is and how the person looks: Identity (shape and colours), Scene (light, background), textures.

Skin, lips, brows, hair, beard and shirt are painted on a cylinder around the vertical axis between the ears, in
template space: columns are the azimuth -pi..pi (0 is the nose, + is the subject's left), rows the height. All of it is
procedural.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np

from demo.world.head import LOCAL_NAMES, HeadModel, load_basis

TEXTURE_TOP, TEXTURE_BOTTOM = 0.15, -0.36  # metres
_WIDTH, _HEIGHT = 768, 576
_MOUTH_LINE, _MOUTH_HALF = -0.0515, 0.262  # metres and radians, in template space
_SPLITS = {"train": 1, "val": 2, "test": 3}
_HAIR_STYLES = {"shaved": 0.08, "short": 0.30, "thick": 0.24, "long": 0.22, "fringe": 0.10, "bald": 0.06}

# sRGB 0..255 from light to dark; an identity mixes two neighbours.
_SKINS = np.array(
    [[246, 214, 196], [236, 194, 168], [222, 174, 142], [198, 146, 110], [163, 112, 80], [122, 80, 56], [86, 56, 42]],
    float,
)
_HAIRS = np.array(
    [[26, 21, 20], [46, 32, 26], [82, 54, 36], [122, 82, 50], [184, 140, 84], [216, 184, 124], [150, 66, 34],
     [188, 186, 186], [112, 110, 112]], float
)  # fmt: skip
_IRISES = np.array(
    [[62, 36, 22], [96, 60, 32], [112, 92, 48], [86, 120, 74], [78, 124, 168], [112, 158, 198], [120, 132, 142]]
)


@dataclass(frozen=True)
class Identity:
    """Everything that stays the same for a person. Colours are sRGB 0..255."""

    seed: int
    phenotypes: dict[str, float]
    local: dict[str, float]
    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    hair_style: str
    iris: tuple[float, float, float]
    lips: tuple[float, float, float]
    shirt: tuple[float, float, float]
    traits: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def sample(seed: int, split: str = "train") -> Identity:
        """The person number `seed` of a split (train, val, test); splits never share a person."""
        rng = np.random.default_rng([20261121, _SPLITS[split], seed])
        race = rng.dirichlet([0.55, 0.55, 0.55])
        gender = float(np.clip(rng.beta(0.5, 0.5), 0.02, 0.98))  # 0 male, 1 female in anny
        phenotypes = {
            "gender": gender,
            "age": float(rng.uniform(0.52, 0.95)),
            "muscle": float(rng.uniform(0.2, 0.8)),
            "weight": float(np.clip(rng.normal(0.48, 0.18), 0.1, 0.9)),
            "african": float(race[0]), "asian": float(race[1]), "caucasian": float(race[2]),
        }  # fmt: skip
        local = {name: float(np.clip(rng.normal(0, 0.32), -0.75, 0.75)) for name in LOCAL_NAMES}
        for name, share in (("nose_hump", 0.6), ("ear_wing", 0.5), ("eye_bag", 0.5), ("head_angle", 0.4)):
            local[name] *= share
        local["eye_opening"] = abs(local["eye_opening"]) * 0.8  # open eyes are what gaze is read from
        local["eye_scale"] = abs(local["eye_scale"]) * 0.7
        tone = float(np.clip(0.8 + 4.6 * race[0] + 1.2 * race[1] + rng.normal(0, 0.8), 0, 5.999))
        skin = _mix(_SKINS, tone) * rng.normal(1, 0.03) * rng.normal(1, 0.012, 3)
        hair_choice = rng.choice(len(_HAIRS), p=_hair_odds(tone, phenotypes["age"]))
        hair = _HAIRS[hair_choice] * rng.uniform(0.85, 1.2)
        iris = _IRISES[rng.choice(len(_IRISES), p=_iris_odds(tone))] * rng.uniform(0.85, 1.2)
        odds = np.array(list(_HAIR_STYLES.values()))
        if gender > 0.5:
            odds = odds * np.array([0.15, 0.8, 1.0, 2.8, 1.6, 0.05])
        style = str(rng.choice(list(_HAIR_STYLES), p=odds / odds.sum()))
        rosy = np.array([200, 92, 92]) if gender < 0.5 else np.array([206, 72, 84])
        lips = skin * 0.50 + rosy * (0.34 if gender < 0.5 else 0.46) * (0.75 + 0.25 * skin.mean() / 200)
        beard = 0.0 if gender > 0.5 or rng.random() < 0.45 else float(rng.choice([0.3, 0.5, 0.85]))
        traits = {
            "hairline": float(rng.normal(0, 0.006)),
            "temples": float(rng.uniform(0, 1) if gender < 0.5 else 0.2 * rng.random()),
            "peak": float(rng.uniform(-0.2, 1)),
            "part": float(rng.uniform(-0.35, 0.35)),
            "length": float(rng.uniform(-0.20, -0.06)),
            "volume": float(rng.uniform(0.4, 1.0)),
            "curl": float(rng.uniform(0, 1)),
            "brow_thickness": float(rng.uniform(0.7, 1.35) * (1.1 if gender < 0.5 else 0.85)),
            "brow_arch": float(rng.uniform(0.1, 1.0)),
            "brow_height": float(rng.normal(0, 0.0012)),
            "brow_alpha": float(rng.uniform(0.72, 0.97)),
            "beard": beard,
            "beard_style": float(rng.integers(0, 4)),
            "blush": float(rng.uniform(0.05, 0.5)),
            "freckles": float(rng.uniform(0.3, 0.8) if tone < 2 and rng.random() < 0.25 else 0.0),
            "liner": float(rng.uniform(0.1, 0.35) if gender < 0.5 else rng.uniform(0.3, 0.85)),
            "gloss": float(rng.uniform(0.5, 1.2)),
            "iris_radius": float(rng.uniform(0.40, 0.45)),
            "pupil_radius": float(rng.uniform(0.15, 0.20)),
            "noise": float(rng.uniform(0, 1)),
            "neckline": float(rng.uniform(-0.20, -0.15)),
        }
        return Identity(
            seed=seed, phenotypes=phenotypes, local=local, skin=_colour(skin), hair=_colour(hair), hair_style=style,
            iris=_colour(iris), lips=_colour(lips), shirt=_colour(rng.uniform(20, 220, 3)), traits=traits,
        )  # fmt: skip

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Identity:
        return Identity(**values)

    def head(self) -> HeadModel:
        return HeadModel(self.phenotypes, self.local)


@dataclass(frozen=True)
class Scene:
    """Light and background of one clip; directions in canonical head space, colours linear."""

    key_direction: tuple[float, float, float]
    key_colour: tuple[float, float, float]
    fill_direction: tuple[float, float, float]
    fill_colour: tuple[float, float, float]
    sky: tuple[float, float, float]
    ground: tuple[float, float, float]
    background_top: tuple[float, float, float]
    background_bottom: tuple[float, float, float]

    @staticmethod
    def sample(rng: np.random.Generator, black_share: float = 0.7) -> Scene:
        side = rng.choice([-1.0, 1.0])
        azimuth, height = side * rng.uniform(0.15, 1.0), rng.uniform(0.1, 0.8)
        key = _direction(azimuth, height)
        warmth = rng.normal(0, 0.07)
        tint = np.array([1 + warmth, 1.0, 1 - warmth])
        power = rng.uniform(0.60, 0.88)
        ambient = rng.uniform(0.20, 0.38) * np.array([1 - 0.5 * warmth, 1.0, 1 + 0.5 * warmth])
        if rng.random() < black_share:
            top = bottom = np.zeros(3)
        else:
            top = rng.uniform(0.02, 0.75, 3) ** 1.5
            bottom = top if rng.random() < 0.5 else top * rng.uniform(0.3, 1.2)
        return Scene(
            key_direction=tuple(key), key_colour=_colour(power * tint),
            fill_direction=tuple(_direction(-azimuth * rng.uniform(0.8, 1.8), rng.uniform(-0.2, 0.4))),
            fill_colour=_colour(rng.uniform(0.12, 0.30) * rng.uniform(0.85, 1.15, 3)),
            sky=_colour(ambient), ground=_colour(ambient * rng.uniform(0.5, 0.9) * np.array([1.05, 1.0, 0.92])),
            background_top=_colour(top), background_bottom=_colour(bottom),
        )  # fmt: skip

    @staticmethod
    def from_dict(values: dict) -> Scene:
        return Scene(**values)

    @staticmethod
    def studio() -> Scene:
        """A soft key from the subject's left, black background."""
        return Scene(
            tuple(_direction(0.6, 0.45)), (0.9, 0.88, 0.85), tuple(_direction(-0.8, 0.1)), (0.22, 0.23, 0.25),
            (0.28, 0.29, 0.30), (0.20, 0.19, 0.18), (0, 0, 0), (0, 0, 0),
        )  # fmt: skip

    def to_dict(self) -> dict:
        return asdict(self)


class Appearance:
    """Texture, per-vertex arrays and uniforms that the renderer takes for one identity in one scene."""

    def __init__(self, identity: Identity, head: HeadModel, scene: Scene):
        basis = load_basis()
        count = basis.num_vertices
        self.texture, hair_line = paint(identity)
        self.template = basis.mean[:count].copy()  # skin looks itself up where the mean head has it
        for rows, centre in zip(basis.eye_rows, head.eye_centres, strict=True):
            self.template[rows] = head.rest[rows] - centre
        self.occlusion = basis.occlusion
        self.hair_offset = hair_volume(identity, head, hair_line)
        covered = np.linalg.norm(self.hair_offset, axis=1) > 0.002
        self.occlusion = np.where(covered, np.maximum(self.occlusion, 0.6), self.occlusion).astype(np.float32)
        linear = (np.asarray(identity.iris) / 255) ** 2
        self.look = {
            **asdict(scene),
            "iris_colour": 1.35 * linear,
            "sclera_colour": np.array([0.80, 0.78, 0.75]),
            "lash_colour": 0.35 * (np.asarray(identity.hair) / 255) ** 2 + 0.004,
            "iris_radius": identity.traits["iris_radius"],
            "pupil_radius": identity.traits["pupil_radius"],
            "gloss": identity.traits["gloss"],
        }


def _colour(values) -> tuple[float, float, float]:
    return tuple(round(float(v), 4) for v in values)


def _mix(table: np.ndarray, place: float) -> np.ndarray:
    low = int(place)
    return table[low] * (1 - place + low) + table[min(low + 1, len(table) - 1)] * (place - low)


def _direction(azimuth: float, height: float) -> np.ndarray:
    vector = np.array([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)])
    return vector.round(5)


def _hair_odds(tone: float, age: float) -> np.ndarray:
    odds = np.array([3.0, 3, 3, 3, 2, 1.6, 1.4, 0, 0])
    if tone > 2.2:
        odds *= np.array([1, 1, 0.5, 0.15, 0.05, 0.06, 0.05, 0, 0])
    odds += np.array([0, 0, 0, 0, 0, 0, 0, 1, 0.8]) * odds.sum() * (0.35 if age > 0.78 else 0.015)
    return odds / odds.sum()


def _iris_odds(tone: float) -> np.ndarray:
    odds = np.array([2.0, 2, 1.5, 1.5, 2, 2, 1]) if tone < 2.4 else np.array([3.0, 2, 0.7, 0.15, 0.1, 0.1, 0.1])
    return odds / odds.sum()


def _smooth(low: float, high: float, values: np.ndarray) -> np.ndarray:
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def _canvas() -> dict[str, np.ndarray]:
    """Coordinates and noise of the texture; noise has zero mean and unit deviation."""
    azimuth = ((np.arange(_WIDTH) + 0.5) / _WIDTH * 2 - 1) * np.pi
    height = TEXTURE_TOP - (np.arange(_HEIGHT) + 0.5) / _HEIGHT * (TEXTURE_TOP - TEXTURE_BOTTOM)
    rng = np.random.default_rng(5)

    def noise(across: float, down: float) -> np.ndarray:
        """White noise blurred by a Gaussian (sigma in texels), through the FFT so that it wraps."""
        spectrum = np.fft.rfft2(rng.normal(size=(_HEIGHT, _WIDTH)))
        fy = np.fft.fftfreq(_HEIGHT)[:, None]
        fx = np.fft.rfftfreq(_WIDTH)[None]
        field_ = np.fft.irfft2(
            spectrum * np.exp(-2 * np.pi**2 * ((fx * across) ** 2 + (fy * down) ** 2)), (_HEIGHT, _WIDTH)
        )
        return ((field_ - field_.mean()) / field_.std()).astype(np.float32)

    return {
        "a": azimuth[None].astype(np.float32), "y": height[:, None].astype(np.float32),
        "fine": noise(1.0, 1.0), "medium": noise(5, 5), "coarse": noise(24, 24), "strand": noise(1.3, 16),
        "lock": noise(5, 34), "hairs": noise(1.1, 3.0),
    }  # fmt: skip


def hairline(identity: Identity, azimuth: np.ndarray) -> np.ndarray:
    """Azimuth (radians, any shape) -> height above which hair grows, metres in template space."""
    traits, style = identity.traits, identity.hair_style
    side = np.abs(azimuth)
    front = 0.086 + traits["hairline"]
    if style == "fringe":
        front = 0.058
    ridge = front + 0.014 * traits["temples"]
    if style in ("long", "fringe"):
        length = traits["length"]
        points = [
            (0, front),
            (0.35, ridge),
            (0.62, front - 0.012),
            (0.84, 0.045),
            (0.95, 0.0),
            (1.02, length),
            (np.pi, length - 0.01),
        ]
    else:
        points = [
            (0, front), (0.35, ridge), (0.62, ridge), (0.85, 0.062), (1.02, 0.030), (1.10, -0.004), (1.27, -0.006),
            (1.36, 0.036), (1.72, 0.038), (1.88, 0.0), (2.05, -0.045), (np.pi, -0.055),
        ]  # fmt: skip
    if style == "bald":
        points = [
            (0, 0.16),
            (1.0, 0.16),
            (1.15, 0.05),
            (1.36, 0.036),
            (1.72, 0.038),
            (1.88, 0.0),
            (2.05, -0.045),
            (np.pi, -0.05),
        ]
    line = np.interp(side, *zip(*points, strict=True))
    line = line - 0.008 * traits["peak"] * np.exp(-((azimuth / 0.11) ** 2)) * (style != "fringe")
    return line + 0.05 * traits["part"] * azimuth * np.exp(-((azimuth / 0.5) ** 2))


def paint(identity: Identity) -> tuple[np.ndarray, np.ndarray]:
    """Identity -> texture uint8 [rows, columns, 4] (square root of linear colour, shine), hair line [columns]."""
    c = _canvas()
    a, y, traits = c["a"], c["y"], identity.traits
    side = np.abs(a)
    shift = int(traits["noise"] * _WIDTH)
    fine, medium, coarse, strand, lock, hairs = (
        np.roll(c[name], shift, 1) for name in ("fine", "medium", "coarse", "strand", "lock", "hairs")
    )
    skin = np.asarray(identity.skin, np.float32) / 255
    image = np.empty((_HEIGHT, _WIDTH, 4), np.float32)
    image[..., :3] = skin * (1 + 0.012 * fine + 0.016 * medium + 0.018 * coarse)[..., None]
    image[..., 3] = 0.06

    def blend(mask: np.ndarray, colour, shine: float | None = None) -> None:
        rows = np.flatnonzero(mask.max(1) > 1e-3)
        if not len(rows):
            return
        cut = slice(rows[0], rows[-1] + 1)
        part = mask[cut, :, None]
        colour = np.asarray(colour, np.float32)
        image[cut, :, :3] += part * ((colour[cut] if colour.ndim == 3 else colour) - image[cut, :, :3])
        if shine is not None:
            image[cut, :, 3] += part[..., 0] * (shine - image[cut, :, 3])

    def blob(at: float, up: float, wide: float, high: float) -> np.ndarray:
        return np.exp(-(((side - at) / wide) ** 2) - ((y - up) / high) ** 2)

    red = skin * np.array([1.0, 0.66, 0.64], np.float32)
    blend(traits["blush"] * blob(0.52, -0.014, 0.22, 0.020), red)
    blend((0.12 + 0.4 * traits["blush"]) * blob(0.0, -0.022, 0.13, 0.014), red)
    blend(0.25 * blob(1.6, 0.0, 0.25, 0.03), red)
    blend(0.22 * blob(0.335, 0.003, 0.16, 0.008), skin * np.array([0.72, 0.62, 0.66], np.float32))
    if traits["freckles"]:
        spots = _smooth(1.3, 2.2, medium * 0.4 + fine * 0.95) * traits["freckles"]
        blend(
            spots * np.exp(-((side / 0.8) ** 2) - ((y + 0.008) / 0.03) ** 2),
            skin * np.array([0.66, 0.52, 0.42], np.float32),
        )

    # Beard: sideburn, cheek and jaw, moustache; the lips are painted over it.
    hair = np.asarray(identity.hair, np.float32) / 255
    if traits["beard"]:
        top = np.interp(
            side, [0.0, 0.22, 0.34, 0.6, 0.9, 1.15, 1.25], [-0.030, -0.034, -0.046, -0.056, -0.036, 0.0, 0.01]
        )
        low = -0.118 + 0.02 * np.minimum(side, 1.2)
        area = _smooth(-0.004, 0.004, top - y) * _smooth(-0.006, 0.006, y - low) * _smooth(-0.05, 0.05, 1.25 - side)
        if traits["beard_style"] == 1:  # goatee
            area = area * _smooth(-0.03, 0.03, 0.36 - side)
        elif traits["beard_style"] == 2:  # moustache
            area = area * _smooth(-0.002, 0.002, y + 0.052) * _smooth(-0.03, 0.03, 0.36 - side)
        shade = np.clip(1 + 0.10 * hairs + 0.06 * lock, 0.6, 1.4)[..., None]
        blend(area * traits["beard"] * np.clip(1 + 0.15 * hairs, 0, 1), hair * 0.9 * shade, 0.05)

    # Lips: cupid's bow above, a fuller curve below, a darker line where they meet.
    s = np.clip(side / _MOUTH_HALF, 0, 1)
    upper = _MOUTH_LINE + 0.0098 * (1 - s**2) ** 0.85 - 0.0022 * np.exp(-((a / 0.035) ** 2))
    lower = _MOUTH_LINE - 0.0128 * (1 - s**2) ** 0.75
    lips = _smooth(-0.0012, 0.0012, upper - y) * _smooth(-0.0014, 0.0014, y - lower) * (side < _MOUTH_HALF)
    colour = np.asarray(identity.lips, np.float32) / 255
    tone = np.where(y > _MOUTH_LINE, 0.90, 1.04) * (1 + 0.03 * strand)
    blend(lips * 0.88, colour * tone[..., None], 0.34)
    crease = np.exp(-(((y - _MOUTH_LINE - 0.0008) / 0.0011) ** 2)) * _smooth(0.0, 0.06, 1.08 * _MOUTH_HALF - side)
    blend(0.65 * crease, colour * 0.38)

    # Eye line and brows.
    eye = np.sqrt(((side - 0.338) / 0.165) ** 2 + ((y - 0.0205) / np.where(y > 0.0205, 0.0085, 0.0070)) ** 2)
    ring = np.exp(-(((eye - 0.92) / 0.24) ** 2))
    blend(ring * np.where(y > 0.0205, 1.0, 0.45) * traits["liner"], hair * 0.15 + 0.02, 0.02)
    u = np.clip((side - 0.13) / 0.47, 0, 1)
    arch = 0.0365 + traits["brow_height"] + 0.0075 * traits["brow_arch"] * np.sin(np.pi * u**1.25) + 0.003 * u
    half = 0.0037 * traits["brow_thickness"] * np.interp(u, [0, 0.12, 0.6, 1], [0.8, 1.05, 0.85, 0.28])
    brow = _smooth(-0.0014, 0.0010, half - np.abs(y - arch)) * _smooth(0.10, 0.15, side) * _smooth(0.63, 0.57, side)
    blend(brow * traits["brow_alpha"] * np.clip(1 + 0.16 * hairs, 0, 1), np.minimum(hair * 0.72, skin * 0.62), 0.05)

    # Shirt, then hair over everything.
    front = traits["neckline"] - 0.02 * np.cos(a) + 0.012
    blend(
        _smooth(-0.002, 0.002, front - y),
        np.asarray(identity.shirt, np.float32) / 255 * (1 + 0.03 * fine)[..., None],
        0.03,
    )
    line = hairline(identity, a[0])
    ragged = line[None] + (0.0016 * lock + 0.0010 * strand) * np.exp(-((a / 0.75) ** 4))
    top = _smooth(-0.004, 0.004, y - ragged)
    curl = traits["curl"]
    streak = 1 + (1 - 0.62 * float(hair.mean())) * ((0.17 - 0.05 * curl) * strand + 0.13 * lock + 0.10 * curl * medium)
    cover = {"shaved": 0.62, "bald": 0.60}.get(identity.hair_style, 1.0)
    blend(top * cover, hair * np.clip(streak, 0.45, 1.6)[..., None], 0.05 + 0.12 * float(hair.mean()))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), line


def hair_volume(identity: Identity, head: HeadModel, line: np.ndarray) -> np.ndarray:
    """Offsets [V, 3] that give the hair its volume: outwards from the axis of the head, growing behind the hairline."""
    basis = load_basis()
    count = basis.num_vertices
    mean, skin = basis.mean[:count], basis.material == 0
    style, traits = identity.hair_style, identity.traits
    thick = {"shaved": 0.001, "bald": 0.001, "short": 0.006, "thick": 0.017, "long": 0.013, "fringe": 0.011}[style]
    thick *= 0.6 + 0.8 * traits["volume"]
    azimuth = np.arctan2(mean[:, 0], mean[:, 2])
    place = np.interp(azimuth, ((np.arange(_WIDTH) + 0.5) / _WIDTH * 2 - 1) * np.pi, line)
    mask = _smooth(-0.002, 0.014, mean[:, 1] - place)
    only_skin = np.zeros(count, bool)
    only_skin[np.unique(basis.faces[skin])] = True
    only_skin[np.unique(basis.faces[basis.material == 1])] = False
    axis = np.zeros_like(head.rest)
    axis[:, 1] = np.minimum(head.rest[:, 1], 0.035)
    axis[:, 2] = -0.012
    away = head.rest - axis
    radius = np.linalg.norm(away, axis=1)
    grown = radius + thick * (1 + 0.25 * np.sin(7 * azimuth + 9 * traits["noise"]) * traits["curl"])
    if style in ("long", "fringe"):
        side = np.abs(azimuth)
        shell = (0.088 + thick) * (1 + 0.06 * np.sin(5 * azimuth + 6 * traits["noise"]))
        low = mean[:, 1] < 0.06
        mask = np.where(low, mask * _smooth(0.90, 1.30, side), mask)  # the strands beside the face rise gently
        grown = np.where(low, np.maximum(grown, shell), grown)
        ears = (mean[:, 1] < 0.045) & (side > 1.2) & (side < 2.1) & (mean[:, 1] > -0.045)
        grown = np.where(ears, np.maximum(0.094 + thick, 0), grown)  # hair falls over the ears
    offset = away * (mask * (grown - radius) / np.maximum(radius, 1e-6))[:, None]
    offset[~only_skin] = 0
    return offset.astype(np.float32)
