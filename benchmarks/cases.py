"""What is measured, as data: TOML files of cases, the bundles that they need, and the driving that goes through them.

    [[case]]
    name = "demo"                   # unique in a run
    bundle = "demo"                 # the shipped demo, or a bundle folder; left out: the BUNDLE of the command line, or the demo
    peers = ["torch", "diffusers"]  # beside `engine`, in turns with it
    [case.sweep]                    # one curve: a list for frames, resolution, window, steps or threads
    steps = [1, 2, 4]

The other keys are the fields of `Case`. Shipped files lie in benchmarks/cases; a model's shape is a file of benchmarks/models,
its weights are drawn.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.benchmarks.schema import Sweep
from factorportrait.bundle import MANIFEST, PRECISIONS, Bundle
from factorportrait.config import config_from_dict
from factorportrait.cores import allowed_cpus, usable_cores
from factorportrait.errors import CheckpointError, UserError
from factorportrait.files import whole_folder
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.cache import KINDS as CACHES
from factorportrait.runtime.pipeline import default_threads
from factorportrait.runtime.session import SessionOptions
from factorportrait.shipped import (
    DEMO_NAME,
    cache_folder,
    default_bundle_path,
    demo_bundle_is_current,
    shipped_checkpoint,
)

HERE = Path(__file__).parent
CASES, MODELS = HERE / "cases", HERE / "models"
AXES = ("frames", "resolution", "window", "steps", "threads")
MODES = ("stream", "clip")
DEFAULT_ENGINE = "onnxruntime-cpu"
CHECKPOINT = "checkpoint"  # folder beside the bundles that were made from it here
DRIVING_CYCLE = 8  # different driving frames of a synthetic clip; more would only need memory


class ExportFailed(UserError):
    """fp-export could not make a bundle that a case needs: a failure of the program, not something that is missing here."""


# Keys of a case that older reports have not, and what those ran with.
NEWER = {
    "embedding": "auto", "hoist": "all", "overlap": "none", "commit": "clean", "step_cache": 0.0, "guidance_steps": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement. None takes what the bundle, or the machine, says.

    Attributes:
        bundle: "demo" or a bundle folder; model: instead of it, a shape of benchmarks/models (or a .toml) with random weights.
        precision: None for the bundle's; for fp32 where it is exported here.
        blocks: of the model, fewer than the shape has.
        resolution: side of the square picture; an exported bundle has its own.
        checkpoint: of a bundle folder of one's own, for its rows in PyTorch.
        engine: the row that the others are compared with; peers: the other rows, see benchmarks/peers.
        cache: how keys and values are kept (stream mode): auto, inplace or concat.
        embedding, hoist, overlap, commit, step_cache, guidance_steps: see `factorportrait.runtime.session.SessionOptions`.
        threads: of one operator; None for every core that the process may use.
        frames: of one repetition. The last chunk should be whole: an incomplete one is not steady.
        io: the shipped driving is read and rendered, and a video written, inside the measured time.
        repetitions: at least so many, at most max_repetitions; they end when the 95 % interval of every row's median is within
            `interval` of it on both sides, or when max_seconds have passed.
        cold_start: also start fresh processes of `engine` and time them to their first picture.
        memory_gib: of the host, for the export and all rows at once; a machine with less is told so before anything starts.
    """

    name: str
    bundle: str | None = None
    checkpoint: str | None = None
    model: str | None = None
    blocks: int | None = None
    resolution: int | None = None
    precision: str | None = None
    engine: str = DEFAULT_ENGINE
    peers: tuple[str, ...] = ()
    mode: str | None = None
    steps: int | None = None
    window: int | None = None
    chunk: int | None = None
    guidance: str = "1"
    cache: str = "auto"
    embedding: str = "auto"
    hoist: str = "all"
    overlap: str = "none"
    commit: str = "clean"
    step_cache: float = 0.0
    guidance_steps: int | None = None
    threads: int | None = None
    frames: int = 57
    target_fps: float | None = None
    io: bool = False
    repetitions: int = 6
    max_repetitions: int = 20
    max_seconds: float = 120.0
    interval: float = 0.02
    cold_start: bool = True
    memory_gib: float | None = None
    sweep: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self):
        sizes = ("blocks", "resolution", "steps", "window", "chunk", "threads", "frames", "repetitions")
        for name in (*sizes, "target_fps", "max_seconds", "memory_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise CheckpointError(name, expected="more than 0", found=f"{value:g}", action="choose another number")
        if self.max_repetitions < self.repetitions or not 0 < self.interval < 1:
            raise CheckpointError(
                "repetitions and interval", expected="repetitions <= max_repetitions, and an interval between 0 and 1",
                found=f"{self.repetitions}, {self.max_repetitions} and {self.interval:g}", action="choose other numbers",
            )  # fmt: skip
        if self.precision is not None and self.precision not in PRECISIONS:
            raise CheckpointError(
                "precision", expected=" or ".join(PRECISIONS), found=repr(self.precision), action=near(self.precision, PRECISIONS)
            )
        for name, known in (("mode", MODES), ("cache", CACHES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise CheckpointError(name, expected=" or ".join(known), found=repr(value), action=near(value, known))
        if self.bundle is not None and self.model is not None:
            raise CheckpointError("bundle and model", expected="one of them", found="both", action="remove one")
        if self.model is not None and self.precision is None:
            object.__setattr__(self, "precision", PRECISIONS[0])
        if self.model is None and self.blocks is not None:
            raise CheckpointError("blocks", expected="a model", found="a bundle, which has its own", action="remove it")
        if self.sweep is not None and (len(self.sweep) != 1 or set(self.sweep) - set(AXES) or not all(self.sweep.values())):
            found = ", ".join(self.sweep) or "none"
            raise CheckpointError("sweep", expected=f"one list: {', '.join(AXES)}", found=found, action=near(found, AXES))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the engine and of its peers, each once."""
        return tuple(dict.fromkeys((self.engine, *self.peers)))

    def points(self) -> list[tuple[Case, Sweep | None]]:
        """The case itself, or one per point of its curve."""
        if self.sweep is None:
            return [(self, None)]
        ((axis, values),) = self.sweep.items()
        return [
            (replace(self, name=f"{self.name}:{axis}={value}", sweep=None, **{axis: value}), Sweep(self.name, axis, float(value)))
            for value in values
        ]

    def to_config(self) -> dict[str, Any]:
        """What a report says of the case: everything that changes its times, nothing of where files lie or how often it ran."""
        left_out = {
            "name", "checkpoint", "engine", "peers", "sweep", "repetitions", "max_repetitions", "max_seconds", "interval",
            "cold_start", "memory_gib",
        }  # fmt: skip
        config = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        # What is as it always was is not said, so that reports can be compared with older ones.
        config = {key: value for key, value in config.items() if key not in NEWER or value != NEWER[key]}
        if self.bundle is not None:
            config["bundle"] = Path(self.bundle).name
        return config


def shipped_names() -> list[str]:
    """Names that --cases knows."""
    return sorted(path.stem for path in CASES.glob("*.toml"))


def load_cases(names: Sequence[str], bundle: str | None = None) -> list[Case]:
    """Cases of shipped files by name, or of files of one's own, in order.

    Args:
        bundle: for cases that name neither a bundle nor a model; None for the demo.

    Raises:
        UserError: no such case or file, not TOML, an unknown key, a wrong value, or a name twice.
    """
    cases: list[Case] = []
    for name in names:
        path = CASES / f"{name}.toml"
        if name not in shipped_names():
            path = Path(name)
            if not path.is_file():
                known = shipped_names()
                raise UserError(
                    f"--cases {name}", expected=f"a file, or one of {', '.join(known)}", found="neither",
                    action=near(name, known) or "name another, or write a TOML file",
                )  # fmt: skip
        cases += read_cases(path)
    cases = [case if case.bundle or case.model else replace(case, bundle=bundle or DEMO_NAME) for case in cases]
    cases = [case if case.precision else replace(case, precision=_precision(case)) for case in cases]
    twice = [case.name for i, case in enumerate(cases) if case.name in {other.name for other in cases[:i]}]
    if twice:
        raise UserError("--cases", expected="names that differ", found=f"{twice[0]} twice", action="rename or leave out one")
    return cases


def _precision(case: Case) -> str:
    """Of the bundle folder that a case names, or what is exported for it."""
    return PRECISIONS[0] if is_demo(case) else Bundle(case.bundle).manifest.precision


def is_demo(case: Case) -> bool:
    """Whether the case means the shipped demo, and not a bundle folder of that name."""
    return case.bundle == DEMO_NAME and not Path(DEMO_NAME, MANIFEST).is_file()


def read_cases(path: Path) -> list[Case]:
    """The cases of one TOML file; see `load_cases`."""
    where = f"cases {path}"
    data = read_toml(path, where)
    unknown = sorted(set(data) - {"case"})
    entries = data.get("case")
    if unknown or not isinstance(entries, list) or not entries:
        found = f"the key {unknown[0]!r}" if unknown else "none"
        raise UserError(where, expected="tables [[case]]", found=found, action="see the shipped files for examples")
    try:
        return [
            config_from_dict(Case, entry, f"{where}: {entry.get('name', i) if isinstance(entry, dict) else i}")
            for i, entry in enumerate(entries)
        ]
    except CheckpointError as error:
        raise UserError(
            error.what, expected=error.expected, found=error.found, action=error.action.replace("config.json", path.name)
        ) from error


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """Raises UserError unless the file is TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(where, expected="TOML", found=str(error), action="correct the file") from error


def near(name: str, known: Sequence[str]) -> str:
    """`did you mean X?`, or nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean {found[0]}?" if found else ""


def materialise(case: Case) -> Path:
    """The bundle folder of a case; the demo's and random ones are exported where they are missing or out of date.

    Raises:
        UserError: the bundle is missing or of another precision, the shape is not known, or the export failed.
    """
    if case.model is not None:
        config = model_config(case)
        return _exported(f"{config.name}-{_digest(config)}", config, case.precision)
    if is_demo(case):
        if case.resolution is not None:
            return _resized_demo(case)
        path = default_bundle_path(DEMO_NAME, case.precision)
        # Where it can be exported it always is, or graphs of an older exporter would be measured. Up to date costs a second.
        if importlib.util.find_spec("torch") is not None or not demo_bundle_is_current(path):
            _export(shipped_checkpoint(), path, case.precision)
        return path
    bundle = Bundle(case.bundle)
    if not bundle.config.conditioning.shows_expression:
        raise UserError(
            f"case {case.name}", expected="FactorPortrait, whose work is counted", found=f"one of {bundle.config.system}",
            action="fp-run --json prints the times of a run",
        )  # fmt: skip
    sizes = {bundle.config.height, bundle.config.width}
    if case.resolution is not None and sizes != {case.resolution}:
        raise UserError(
            f"case {case.name}: resolution", expected=f"{bundle.config.height} x {bundle.config.width}, the bundle's",
            found=str(case.resolution), action="leave it out, or measure a model's shape",
        )  # fmt: skip
    if case.precision not in (None, bundle.manifest.precision):
        raise UserError(
            f"case {case.name}", expected=f"a bundle in {case.precision}", found=f"{case.bundle} in {bundle.manifest.precision}",
            action=f"export it with --precision {case.precision}, or change the case",
        )  # fmt: skip
    return bundle.path


def model_config(case: Case) -> ModelConfig:
    """The config of a case's model shape.

    Raises:
        UserError: no such shape, or sizes that do not go together.
    """
    path = MODELS / f"{case.model}.toml"
    if not path.is_file():
        path = Path(case.model)
    if path.suffix != ".toml" or not path.is_file():
        known = sorted(file.stem for file in MODELS.glob("*.toml"))
        raise UserError(
            f"case {case.name}: model", expected=f"a .toml file, or one of {', '.join(known)}", found=case.model,
            action=near(case.model, known) or "name another shape",
        )  # fmt: skip
    data = read_toml(path, f"model {path}")
    if case.resolution is not None:
        data |= {"height": case.resolution, "width": case.resolution}
    if case.blocks is not None:
        data["dit"] = data["dit"] | {"num_layers": case.blocks}
    try:
        return ModelConfig.from_dict(data, f"model {path}")
    except CheckpointError as error:
        raise UserError(error.what, expected=error.expected, found=error.found, action="change the shape or the case") from error


def _resized_demo(case: Case) -> Path:
    checkpoint = shipped_checkpoint()
    data = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    data |= {"height": case.resolution, "width": case.resolution}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_folder() / "bench" / f"demo-{case.resolution}-{digest}"
    with whole_folder(folder / CHECKPOINT) as copy:
        for file in checkpoint.iterdir():
            if file.suffix in (".safetensors", ".npz"):
                shutil.copyfile(file, copy / file.name)
        (copy / "config.json").write_text(json.dumps(data), encoding="utf-8")
    _export(folder / CHECKPOINT, folder / case.precision, case.precision)
    return folder / case.precision


def _exported(name: str, config: ModelConfig, precision: str) -> Path:
    folder = cache_folder() / "bench" / name
    if not (folder / CHECKPOINT / "config.json").is_file():
        _run(["-m", "factorportrait.benchmarks.random_checkpoint", str(folder / CHECKPOINT)], json.dumps(config.to_dict()))
    _export(folder / CHECKPOINT, folder / precision, precision)
    return folder / precision


def _export(checkpoint: Path, output: Path, precision: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "making a bundle to measure", expected="torch", found="none",
            action='pip install "factorportrait[export]", or name a bundle',
        )  # fmt: skip
    # Nothing is done when the bundle is there and up to date; that costs the digests of the files.
    arguments = [str(checkpoint), "--output", str(output), "--precision", precision]
    _run(["-m", "factorportrait.export.cli", *arguments])


def _run(arguments: list[str], text: str = "") -> None:
    """Python in a process of its own, so that torch does not stay in this one. Its last line on stderr is what went wrong."""
    done = subprocess.run([sys.executable, *arguments], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportFailed(
            "making a bundle to measure", expected="fp-export to make it", found=last.removeprefix("fp-export: error: "),
            action="mend that, or name a bundle",
        )  # fmt: skip


def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


def session_options(case: Case) -> SessionOptions:
    """How the case generates."""
    return SessionOptions(
        case.mode, case.steps, case.guidance, 0, case.chunk, case.window, case.cache,
        **{name: getattr(case, name) for name in NEWER},
    )  # fmt: skip


def resolve(case: Case, config: ModelConfig) -> Case:
    """Fill in what the bundle and the machine say, so that the report holds numbers.

    Raises:
        UserError: a mode or sizes that the bundle does not have, or too few frames for a steady chunk.
    """
    options = session_options(case).resolve(config)
    case = replace(
        case, mode=options.mode, steps=options.steps, chunk=options.chunk_frames, window=options.window_frames,
        threads=case.threads or default_threads(case.overlap, options.mode) or usable_cores(),
        target_fps=case.target_fps or config.fps, resolution=config.height,
    )  # fmt: skip
    if case.threads > (cpus := len(allowed_cpus())):
        raise UserError(
            f"case {case.name}: threads", expected=f"at most {cpus}, the processors here", found=str(case.threads),
            action="use fewer",
        )  # fmt: skip
    longest = 1 + FRAMES_PER_LATENT * (config.generation.max_clip_frames - 1)
    if case.mode == "clip" and case.frames > longest:
        raise UserError(
            f"case {case.name}: frames", expected=f"at most {longest} in clip mode", found=str(case.frames), action="use fewer"
        )
    least = frames_until_steady(case)
    if case.mode == "stream" and case.frames < least:
        raise UserError(
            f"case {case.name}: frames", expected=f"{least} or more: a chunk is steady when it sees a full window",
            found=str(case.frames), action="use more",
        )  # fmt: skip
    return case


def frames_until_steady(case: Case) -> int:
    """Frames after which a stream's first steady chunk is complete."""
    before = max(1, -(-(case.window - case.chunk) // case.chunk))
    return 1 + FRAMES_PER_LATENT * ((before + 1) * case.chunk - 1)


def synthetic_driving(config: ModelConfig, num_frames: int) -> tuple[np.ndarray, Iterator]:
    """A portrait uint8 [H,W,3] and `num_frames` driving frames with pictures for the expression encoder, all seeded."""
    from factorportrait.runtime.conditions import DrivingFrame
    from factorportrait.runtime.inputs import default_camera

    rng = np.random.default_rng(0)
    K, c2w = default_camera(config)
    side, size = config.expression.image_size, (config.height, config.width, 3)
    frames = [
        DrivingFrame(_picture(rng, size), K, c2w, image=_picture(rng, (side, side, 3)))
        for _ in range(min(num_frames, DRIVING_CYCLE))
    ]
    return _picture(rng, size), (frames[i % DRIVING_CYCLE] for i in range(num_frames))


def _picture(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8)
