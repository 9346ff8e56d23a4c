"""The systems that one config-driven transformer serves: what each is conditioned on, and how its slots lie. Data, no torch.

FactorPortrait (arXiv 2512.11645) on any Wan backbone; Wan2.1-Fun Control and Control-Camera; Self-Forcing (arXiv 2506.08009);
Wan2.2-Animate (arXiv 2509.14055).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        summary: for people.
        streams: what the patch embedding takes; the order is the config's.
        parts: further inputs of the transformer, as fields of `DiTConfig`.
        follows: what of the driving reaches the network: expression (codes), face (pictures), pose (normal maps or a control
            video), camera (rays).
        reference: how the portrait gets in. "sink": slot 0, clean, at timestep 0, kept in front of the cache. "slot": slot 0
            without noise, at the timestep of the others, dropped at the end. "noised": slot 0, denoised like the others and
            dropped. "start": the latents of the first frame. "context": a still first chunk, committed and shown as it is.
        shows_expression: the modulation of the blocks carries an expression.
    """

    summary: str
    streams: tuple[str, ...]
    parts: frozenset[str]
    follows: frozenset[str]
    reference: str
    shows_expression: bool = False

    @property
    def lead_slots(self) -> int:
        """Slots in front of the frames of a clip."""
        return int(self.reference in ("sink", "slot", "noised"))

    @property
    def sink_slots(self) -> int:
        """Slots in front of the window of a stream that stay in the cache."""
        return int(self.reference == "sink")


def _system(summary: str, streams: str, parts: str, follows: str, reference: str, **more: bool) -> System:
    return System(summary, tuple(streams.split()), frozenset(parts.split()), frozenset(follows.split()), reference, **more)


SYSTEMS = {
    "factorportrait": _system(
        "FactorPortrait: portrait, expression, head pose and camera", "reference noise camera pose", "",
        "expression pose camera", "sink", shows_expression=True,
    ),
    "wan-fun-control": _system(
        "Wan2.1-Fun Control: portrait and a control video", "noise control image", "image_dim reference_channels", "pose", "slot"
    ),
    "wan-fun-camera": _system(
        "Wan2.1-Fun Control-Camera: first frame and camera", "noise image", "image_dim ray_adapter", "camera", "start"
    ),
    "self-forcing": _system(
        "Self-Forcing: a causal stream from a prompt, begun by the portrait", "noise", "", "", "context"
    ),
    "wan-animate": _system(
        "Wan2.2-Animate: portrait, pose video and face video", "noise mask image", "image_dim pose_channels face", "pose face",
        "noised",
    ),
}  # fmt: skip
