"""Sizes and choices of a model, read from a checkpoint's config.json. No torch here: the runtime reads them from a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any

from factorportrait.config import CORRECT, PatchVAEConfig, VAEConfig, config_from_dict, config_to_dict, require_positive
from factorportrait.errors import CheckpointError
from factorportrait.systems import SYSTEMS, System

STREAMS = ("reference", "noise", "camera", "pose")
# What else public Wan models concatenate: a mask of the frames that are given, their latents, a control video's latents.
WAN_STREAMS = ("mask", "image", "control")
SOLVERS = ("euler", "flow-match", "renoise", "unipc", "dpm++")
FRAMES_PER_LATENT = 4  # temporal stride of every Wan VAE; slot 1 holds one frame
TEXT_TOKENS = 512  # rows of a prompt's embeddings; behind the prompt they are zero and seen all the same (Wan's `text_len`)


@dataclass(frozen=True)
class FaceConfig:
    """Face motion of Wan2.2-Animate: picture -> motion code -> tokens per latent frame -> adapters behind blocks.

    Attributes:
        image_size: pixels of a side; a power of 2.
        encoder_widths: channels at image_size, image_size/2, ... down to 4 pixels.
        style_dim: width of the encoder's feature.
        motion_dim: directions that a motion is a sum of.
        code_dim: width of a frame's motion code.
        hidden_dim, num_tokens: of the aggregator; a latent frame gets num_tokens of them and a padding token.
        block_interval: an adapter follows block 0 and every block_interval-th after it.
    """

    image_size: int = 512
    encoder_widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    style_dim: int = 512
    motion_dim: int = 20
    code_dim: int = 512
    hidden_dim: int = 1024
    num_tokens: int = 4
    block_interval: int = 5

    def __post_init__(self):
        object.__setattr__(self, "encoder_widths", tuple(self.encoder_widths))
        require_positive(self, "image_size", "encoder_widths", "style_dim", "motion_dim", "code_dim", "hidden_dim")
        require_positive(self, "num_tokens", "block_interval")
        if self.image_size != 2 ** (len(self.encoder_widths) + 1):
            raise CheckpointError(
                "image_size", expected=f"{2 ** (len(self.encoder_widths) + 1)}, which encoder_widths halve to 4",
                found=str(self.image_size), action=CORRECT,
            )  # fmt: skip
        if self.motion_dim > self.code_dim:
            raise CheckpointError(
                "motion_dim", expected=f"at most code_dim, {self.code_dim}", found=str(self.motion_dim), action=CORRECT
            )


@dataclass(frozen=True)
class RayAdapterConfig:
    """Camera adapter of Wan2.1-Fun Control-Camera: ray maps at the size of the frames -> added to the tokens.

    Attributes:
        channels: of a latent frame's ray map; 6 for each of 4 frames.
        downscale: pixels of a side that become channels, the VAE's spatial stride.
        num_blocks: residual blocks.
    """

    channels: int = 24
    downscale: int = 8
    num_blocks: int = 1

    def __post_init__(self):
        require_positive(self, "channels", "downscale", "num_blocks")


@dataclass(frozen=True)
class DiTConfig:
    """A Wan-class transformer. `dim` must be a multiple of `num_heads`, and the head dimension even in each rotary part.

    Attributes:
        text_dim: width of the prompt's embeddings; None for no cross-attention at all.
        image_dim: width of a picture's embeddings, which cross-attention sees beside the text (I2V, Fun, Animate).
        reference_channels: latents of a reference picture become slot 0 by a convolution of their own (Fun Control).
        pose_channels: pose latents are embedded by a convolution of their own and added (Animate).
        face, ray_adapter: see the classes.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    text_dim: int | None = None
    rope_theta: float = 10000.0
    max_position: int = 1024
    image_dim: int | None = None
    reference_channels: int | None = None
    pose_channels: int | None = None
    face: FaceConfig | None = None
    ray_adapter: RayAdapterConfig | None = None

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        require_positive(self, "dim", "ffn_dim", "num_heads", "num_layers", "out_channels", "patch_size", "freq_dim", "eps")
        require_positive(self, "text_dim", "rope_theta", "max_position", "image_dim", "reference_channels", "pose_channels")
        if self.image_dim is not None and self.text_dim is None:
            raise CheckpointError("image_dim", expected="null without text_dim", found=str(self.image_dim), action=CORRECT)
        if self.freq_dim % 2:
            raise CheckpointError("freq_dim", expected="an even number", found=str(self.freq_dim), action=CORRECT)
        if self.dim % self.num_heads or self.head_dim % 2:
            raise CheckpointError(
                "dim and num_heads",
                expected="dim to be an even multiple of num_heads",
                found=f"dim {self.dim}, num_heads {self.num_heads}",
                action=CORRECT,
            )
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise CheckpointError(
                "patch_size", expected="1 in time and two equal sizes", found=str(list(self.patch_size)), action=CORRECT
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head rotated by time, height and width (Wan: 44, 42, 42 of 128)."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial


@dataclass(frozen=True)
class FusionConfig:
    """Channels of the patch embedding (FactorPortrait, figure 2): which streams, in which order, and how rays are packed.

    Attributes:
        rays: "packed": the 4 frames of a latent, 24 channels; "last": the last of them, 6 channels.
        reference_slots: "first": the reference's latents stand in slot 0 alone, as in the paper; "all": in the slots of the frames
            too, so that a small model need not learn to copy what stays in place.
    """

    streams: tuple[str, ...] = STREAMS
    latent_channels: int = 16
    rays: str = "packed"
    reference_slots: str = "first"

    def __post_init__(self):
        object.__setattr__(self, "streams", tuple(self.streams))
        require_positive(self, "latent_channels")
        known = (*STREAMS, *WAN_STREAMS)
        if "noise" not in self.streams or len(set(self.streams)) < len(self.streams) or set(self.streams) - set(known):
            raise CheckpointError(
                "streams",
                expected=f"noise, and each of {', '.join(name for name in known if name != 'noise')} at most once",
                found=", ".join(self.streams),
                action=CORRECT,
            )
        for name, values in (("rays", ("packed", "last")), ("reference_slots", ("first", "all"))):
            if getattr(self, name) not in values:
                raise CheckpointError(
                    name, expected=" or ".join(values), found=repr(getattr(self, name)), action=CORRECT
                )

    @property
    def ray_channels(self) -> int:
        return 24 if self.rays == "packed" else 6

    def channels(self, stream: str) -> int:
        return {"camera": self.ray_channels, "mask": FRAMES_PER_LATENT}.get(stream, self.latent_channels)

    @property
    def in_channels(self) -> int:
        return sum(self.channels(stream) for stream in self.streams)

    def slice(self, stream: str) -> slice:
        """Where a stream's channels lie in the patch embedding's weight."""
        start = sum(self.channels(other) for other in self.streams[: self.streams.index(stream)])
        return slice(start, start + self.channels(stream))


@dataclass(frozen=True)
class ExpressionConfig:
    """Expression encoder (image -> code), ARKit map and controller (codes -> latent frames -> AdaLN terms)."""

    code_dim: int = 128
    image_size: int = 128
    encoder_widths: tuple[int, ...] = (32, 64, 128, 192)
    encoder_blocks: int = 1
    arkit_hidden: int = 256
    aggregator: str = "causal_conv"  # or "window" (4 codes -> MLP), "mean"
    hidden_dim: int = 256

    def __post_init__(self):
        object.__setattr__(self, "encoder_widths", tuple(self.encoder_widths))
        require_positive(self, "code_dim", "image_size", "encoder_widths", "arkit_hidden", "hidden_dim")
        if self.encoder_blocks < 0:
            raise CheckpointError("encoder_blocks", expected="0 or more", found=str(self.encoder_blocks), action=CORRECT)
        stride = 2 ** (len(self.encoder_widths) + 1)
        if self.image_size % stride:
            raise CheckpointError(
                "image_size",
                expected=f"a multiple of {stride}, which {len(self.encoder_widths)} encoder_widths divide it by",
                found=str(self.image_size),
                action=CORRECT,
            )
        if self.aggregator not in ("causal_conv", "window", "mean"):
            raise CheckpointError(
                "aggregator",
                expected="causal_conv, window or mean",
                found=repr(self.aggregator),
                action=CORRECT,
            )


@dataclass(frozen=True)
class GenerationConfig:
    """How the checkpoint was trained to be run. Lengths in latent frames, the reference slot not counted."""

    modes: tuple[str, ...] = (
        "clip",
        "stream",
    )  # masks of the training: bidirectional, chunk-causal with the reference as sink
    chunk_frames: int = 3
    window_frames: int = 9  # of keys and values that a chunk sees, itself included and the sink not
    max_clip_frames: int = 21
    timestep_shift: float = 1.0
    denoising_steps: int = 4
    solver: str = "euler"  # of SOLVERS, see runtime/schedule.py
    guidance_scale: float = 1.0  # of all conditions at once, where a run asks for no other; 1 is none

    def __post_init__(self):
        object.__setattr__(self, "modes", tuple(self.modes))
        require_positive(
            self, "chunk_frames", "window_frames", "max_clip_frames", "timestep_shift", "denoising_steps", "guidance_scale"
        )
        if not self.modes or any(mode not in ("clip", "stream") for mode in self.modes):
            raise CheckpointError(
                "modes",
                expected="clip, stream or both",
                found=", ".join(self.modes) or "none",
                action=CORRECT,
            )
        if self.solver not in SOLVERS:
            raise CheckpointError(
                "solver", expected=f"{', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}", found=self.solver, action=CORRECT
            )
        if self.chunk_frames > self.window_frames:
            raise CheckpointError(
                "chunk_frames and window_frames",
                expected="1 <= chunk_frames <= window_frames",
                found=f"chunk_frames {self.chunk_frames}, window_frames {self.window_frames}",
                action=CORRECT,
            )


@dataclass(frozen=True)
class CameraConfig:
    """The frontal camera that a user gets without naming one; head space and metres, see DESIGN.md."""

    fov_degrees: float = 20.0
    distance: float = 0.9
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self):
        object.__setattr__(self, "target", tuple(float(value) for value in self.target))
        require_positive(self, "distance")
        if not 0 < self.fov_degrees < 180:
            raise CheckpointError(
                "fov_degrees", expected="more than 0 and less than 180", found=f"{self.fov_degrees:g}", action=CORRECT
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that config.json says."""

    system: str
    height: int
    width: int
    fps: float
    vae: VAEConfig | PatchVAEConfig
    dit: DiTConfig
    fusion: FusionConfig = field(default_factory=FusionConfig)
    expression: ExpressionConfig = field(default_factory=ExpressionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    name: str = "unnamed"

    def __post_init__(self):
        if self.system not in SYSTEMS:
            raise CheckpointError(
                "system",
                expected=" or ".join(SYSTEMS),
                found=repr(self.system),
                action="use a version that knows this system",
            )
        require_positive(self, "height", "width", "fps")
        self._check_inputs()
        if self.vae.temporal_stride != FRAMES_PER_LATENT:
            raise CheckpointError(
                "vae: temporal_downsample",
                expected=f"flags that make {FRAMES_PER_LATENT} frames one latent frame",
                found=f"{self.vae.temporal_stride} frames",
                action=CORRECT,
            )
        longest = max(self.generation.window_frames, self.generation.max_clip_frames)
        if self.dit.max_position <= longest:
            raise CheckpointError(
                "dit: max_position",
                expected=f"more than the {longest} frames of generation's window_frames and max_clip_frames",
                found=str(self.dit.max_position),
                action=CORRECT,
            )
        stride = self.vae.spatial_stride * self.dit.patch_size[1]
        if self.height % stride or self.width % stride:
            raise CheckpointError(
                "height and width",
                expected=f"multiples of {stride}",
                found=f"{self.height} x {self.width}",
                action="choose sizes that the VAE and the patches divide",
            )
        if self.fusion.latent_channels != self.vae.z_dim or self.dit.out_channels != self.vae.z_dim:
            raise CheckpointError(
                "latent channels",
                expected="fusion.latent_channels = dit.out_channels = vae.z_dim",
                found=f"{self.fusion.latent_channels}, {self.dit.out_channels}, {self.vae.z_dim}",
                action=CORRECT,
            )

    def _check_inputs(self) -> None:
        """What the patch embedding and the transformer take has to be what the system gives them."""
        system = self.conditioning
        if set(self.fusion.streams) != set(system.streams):
            raise CheckpointError(
                "fusion: streams",
                expected=f"each of {', '.join(system.streams)} once",
                found=", ".join(self.fusion.streams),
                action=CORRECT,
            )
        for name in ("image_dim", "reference_channels", "pose_channels", "face", "ray_adapter"):
            has, wanted = getattr(self.dit, name) is not None, name in system.parts
            if has and not wanted:
                raise CheckpointError(
                    f"dit: {name}", expected="null: this system has no such input", found="a value",
                    action="take a transformer without it, such as Wan's T2V or TI2V",
                )  # fmt: skip
            if wanted and not has:
                raise CheckpointError(
                    f"dit: {name}", expected=f"a value: {self.system} needs it", found="null", action="take this system's weights"
                )
        if system.reference in ("slot", "noised", "start") and "stream" in self.generation.modes:
            raise CheckpointError(
                "generation: modes", expected=f"clip: {self.system} attends to all frames of a clip", found="stream",
                action=CORRECT,
            )  # fmt: skip
        if system.reference == "context" and "clip" in self.generation.modes:
            raise CheckpointError(
                "generation: modes", expected=f"stream: {self.system} is causal", found="clip", action=CORRECT
            )

    @property
    def conditioning(self) -> System:
        """What the system is conditioned on."""
        return SYSTEMS[self.system]

    @property
    def latent_height(self) -> int:
        return self.height // self.vae.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.vae.spatial_stride

    @property
    def tokens_per_frame(self) -> int:
        _, ph, pw = self.dit.patch_size
        return (self.latent_height // ph) * (self.latent_width // pw)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config") -> ModelConfig:
        """Read a parsed config.json; unknown keys raise and name the near miss."""
        return config_from_dict(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back to an equal config."""
        data = config_to_dict(self)
        return {key: config_to_dict(value) if is_dataclass(value) else value for key, value in data.items()}
