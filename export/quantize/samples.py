"""Calibration samples: inputs of every stage as the fp32 pipeline meets them on its way through real clips.

Every denoising step, the commit pass, the reference, both modes and all states of the VAE caches are among them, because they are
drawn from whole runs. They lie in the user's cache, one file per clip, so that an interrupted recording goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.errors import UserError
from factorportrait.export.quantize.clips import DrivenClip
from factorportrait.files import whole_file

RECORD_AGAIN = "remove the folder, so that it is recorded again"


@dataclass(frozen=True)
class RecordSettings:
    """What is recorded.

    Attributes:
        per_stage: samples of a stage over all clips; fewer where a stage runs less often.
        stage_bytes: most that the samples of one stage may take.
        seed: of the choice among a stage's runs, and of the noise.
    """

    per_stage: int = 32
    stage_bytes: int = 256 * 2**20
    seed: int = 0


class Samples:
    """Recorded inputs of stages, read when asked for.

    Args:
        bundle: whose stages they belong to.
        folder: of the .npz files, one per clip, arrays `stage/number/tensor`.
    """

    def __init__(self, bundle: Bundle, folder: Path, target: str = "cpu"):
        self.bundle, self.folder, self.target = bundle, folder, target
        self.files = sorted(folder.glob("*.npz"))
        if not self.files:
            raise UserError(
                f"calibration samples {folder}", expected="a file of samples per clip", found="none",
                action="record some: fp-export --precision int8",
            )  # fmt: skip

    @property
    def key(self) -> str:
        """Which samples these are: the folder is named by its content."""
        return self.folder.name

    def of(self, stage: str) -> list[dict[str, np.ndarray]]:
        """All samples of a stage: inputs by name; none for a stage that the clips do not run.

        Raises:
            UserError: a tensor is missing, of another type or size than the stage's, or not finite.
        """
        spec = self.bundle.stage(stage, self.target)
        samples = [sample for file in self.files for sample in _read(file, stage)]
        for sample in samples:
            check_sample(spec, sample)
        return samples


def check_sample(spec: StageSpec, sample: Mapping[str, np.ndarray]) -> None:
    """Raises UserError naming stage and tensor unless a sample fits the stage and is finite."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        what = f"calibration of stage {spec.name}: tensor {tensor.name}"
        array = sample.get(tensor.name)
        if array is None:
            raise UserError(what, expected=tensor.describe(), found="no such array", action=RECORD_AGAIN)
        fits = str(array.dtype) == tensor.dtype and array.ndim == len(tensor.shape) and all(
            _fits(size, wanted, sizes) for size, wanted in zip(array.shape, tensor.shape, strict=True)
        )  # fmt: skip
        if not fits:
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(what, expected=tensor.describe(), found=found, action=RECORD_AGAIN)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(what, expected="finite numbers", found="not-a-number or infinity", action=RECORD_AGAIN)


def _fits(size: int, wanted: int | str, sizes: dict[str, int]) -> bool:
    if isinstance(wanted, int):
        return size == wanted
    factor, _, name = wanted.rpartition("*")
    return size == int(factor or 1) * sizes.setdefault(name, size // int(factor or 1))


def record_samples(
    bundle: Bundle,
    clips: Sequence[DrivenClip],
    cache: Path,
    settings: RecordSettings | None = None,
    *,
    threads: int | None = None,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Generate `clips` with the fp32 pipeline and keep inputs of its stages; clips recorded before are not run again.

    Args:
        bundle: in fp32.
        clips: see `clips.py`.
        cache: folder for all recordings; this one gets a folder in it, named by bundle, clips and settings.
        on_clip: called with how many of the clips are done.

    Raises:
        UserError: there is no clip, or generating one gave numbers that are not finite.
    """
    settings = settings or RecordSettings()
    if not clips:
        raise UserError("calibration", expected="at least one clip", found="none", action="name a folder with --calibration")
    identity = {"bundle": bundle.manifest.source_key, "clips": [clip.digest() for clip in clips], **asdict(settings)}
    folder = cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    opened = None
    for i, clip in enumerate(clips):
        on_clip(i, len(clips))
        file = folder / f"{i:03}.npz"
        if file.is_file():
            continue
        if opened is None:
            # Late: only who records needs the runtime.
            from factorportrait.runtime.session import open_bundle

            opened = open_bundle(bundle.path, threads=threads, verify=False)
        recorder = _Recorder(settings, len(clips), seed=i)
        _generate(opened, recorder, clip, settings.seed)
        with whole_file(file) as path:
            _write(path, recorder.kept)
    on_clip(len(clips), len(clips))
    return Samples(bundle, folder)


def _generate(opened, recorder: _Recorder, clip: DrivenClip, seed: int) -> None:
    from factorportrait.engines.recording import RecordingEngine
    from factorportrait.runtime.session import OpenBundle

    watched = OpenBundle(opened.bundle, RecordingEngine(opened.engine, recorder.offer))
    for mode in opened.config.generation.modes:
        # Every stage as a graph: what a run computes beside them would leave one without samples.
        session = watched.session(mode=mode, seed=seed, embedding="graph")
        session.set_reference(clip.portrait)
        for _ in session.frames(clip.driving):
            pass


class _Recorder:
    """Copies of what stages are given: a reservoir per stage, so that every run has the same chance."""

    def __init__(self, settings: RecordSettings, num_clips: int, seed: int):
        self._settings, self._num_clips = settings, num_clips
        self._rng = np.random.default_rng([settings.seed, seed])
        self._seen: dict[str, int] = {}
        self.kept: dict[str, list[dict[str, np.ndarray]]] = {}

    def offer(self, stage: str, inputs: Mapping[str, np.ndarray]) -> None:
        """Keep the inputs of this run, or not."""
        kept = self.kept.setdefault(stage, [])
        self._seen[stage] = self._seen.get(stage, 0) + 1
        settings = self._settings
        size = max(sum(array.nbytes for array in inputs.values()), 1)
        room = max(min(settings.per_stage, settings.stage_bytes // size) // self._num_clips, 1)
        slot = len(kept) if len(kept) < room else int(self._rng.integers(self._seen[stage]))
        if slot < room:
            kept[slot : slot + 1] = [{name: np.array(array) for name, array in inputs.items()}]


def _write(path: Path, kept: Mapping[str, list[dict[str, np.ndarray]]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for stage, samples in sorted(kept.items()):
            for i, sample in enumerate(samples):
                for name, array in sample.items():
                    with archive.open(f"{stage}/{i:03}/{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)


def _read(file: Path, stage: str) -> Iterator[dict[str, np.ndarray]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            samples: dict[str, dict[str, np.ndarray]] = {}
            for key in archive.files:
                name, number, tensor = key.split("/", 2)
                if name == stage:
                    samples.setdefault(number, {})[tensor] = archive[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"calibration samples {file}", expected="a whole .npz", found=str(error), action=RECORD_AGAIN) from error
    yield from samples.values()
