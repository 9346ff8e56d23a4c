"""The JSON report of `fp-bench run`: what is measured, in which units, and how it is read back.

One file, `latency.json` (`write_report`, `read_report`). Its schema is the dataclasses below, field by field; a number that was not
measured is null, never 0. Units are in the names: `_ms` milliseconds, `_s` seconds, `_bytes`, `_fps`, `_j` joules.

    Report                      one run on one machine
      machine, code, versions   what was measured, and on what
      limits[]                  matrix rate and copy bandwidth measured in the same run, per device and number of threads
      noise                     how quiet the machine was
      results[]                 one row per case and peer: `key` = CASE/PEER is equal in all reports of the same case
        repetitions[]           raw samples: each a clip from its reference on, in the order that `order` tells
          chunks[]              frames, wall time, every push, every stage
        latency                 percentiles over the *steady* chunks, told three ways
        stages[]                time, work and share of the limit, per stage

**Timing scope.** Clocks are `time.perf_counter_ns`. A push begins when a driving frame (normals, camera, face crop or
coefficients, decoded and in memory) is handed to the session, and ends when its call returns; the push that completes
a chunk returns its pictures as uint8 [H, W, 3] in host memory. Reading the driving and writing the video count only
where a case says `io = true`; they are then stages `input` and `write`. Loading, export and warm-up never count.
`Report.scope` says the same to whoever reads the report.

**Chunks.** A chunk is steady when it sees a full window of earlier latent frames (stream mode), or always (clip
mode); chunks before that are cheaper and stand in the raw samples alone.

**Latency, three ways.** `per_frame`: a chunk's wall time divided by its frames (each chunk counts once per frame).
`per_chunk`: the wall time itself. `arrival`: from a driving frame's arrival to its picture, the wait for the rest of
the chunk included; arrivals are replayed at `arrival_fps` through the measured push times, one server, first come
first served; where stages overlap they are measured, with a driving that is read as fast as it is taken.
`arrival_fps` is the case's target where the measured throughput reaches it; otherwise null, and frames
arrive exactly when the session is free to take them. `deadline_misses`: share of frames that are not there when a
player wants them that shows `target_fps` pictures a second, two chunks behind a driving of that rate: while one chunk
is being collected, the one before may be computed.

**Stages.** `stage_ms` of a chunk holds wall time by stage: `expression`, `pose`, `conditions`, `step.0` ...
`step.N-1`, `commit` (or `steps`: all of them and the conditions as one call of a GPU), `decode`, with `input` and
`write` where they count, and `other`: the time in which none of them ran, which is the loop's own Python (converting
pictures, drawing noise, positions) and its caller's. In serial execution the stages of a chunk do not overlap, so
with `other` they sum to its wall time; `accounted` is the share without it. In overlapped execution `occupancy`
says which share of the wall time each stage was busy, and `critical_path` which stages bound it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factorportrait.config import config_from_dict
from factorportrait.errors import CheckpointError, UserError
from factorportrait.files import whole_file

KIND = "factorportrait-latency"
SCHEMA = 1
REPORT_FILE = "latency.json"
STATUSES = ("ok", "unavailable", "failed", "interrupted")
BUNDLE_KEYS = ("bundle", "precision")  # of a config: they tell what is compared where two bundles took turns
OTHER = "other"  # the stage of the time in which no stage ran
ACCOUNTED = 0.98  # of serial wall time that named stages should explain; a row with less says so


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, at the end of the run; throttle reasons are those that were seen before and after every case."""

    name: str
    driver: str
    memory_bytes: int
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    power_limit_w: float | None = None
    throttle_reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What ran the cases. cpu_mhz: mean of the cores at the start and after every case, where the system tells."""

    system: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    cpu_mhz: tuple[float, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    @property
    def identity(self) -> str:
        """Equal for machines whose times may be compared."""
        gpus = ", ".join(f"{gpu.name} driver {gpu.driver}" for gpu in self.gpus) or "no GPU"
        return f"{self.system}, {self.cpu}, {self.cores} cores, {' '.join(self.cpu_flags)}, {gpus}"


@dataclass(frozen=True)
class Code:
    """The measured program. commit and dirty are null outside of a checkout."""

    version: str
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    committed: str | None = None  # ISO 8601: history sorts by it


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured: best of several rounds.

    Attributes:
        device: "cpu", or the GPU's name.
        threads: of the measured product; 0 on a GPU.
        matrix_flops: operations a second (a multiplication and an addition are two) by data type: fp32, bf16, fp16, int8.
        missing: by data type, why it was not measured.
        copy_bytes_s: bytes read plus bytes written, a second, of a copy far larger than the caches.
    """

    device: str
    threads: int
    matrix_flops: Mapping[str, float]
    copy_bytes_s: float
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """How quiet the machine was. `reasons` says in words what makes a run noisy; it is empty for a quiet one.

    Attributes:
        spin_ms: a fixed amount of arithmetic, timed before every repetition of this row (of all rows, in the report's).
        spin_spread: (p90 - p10) / p50 of spin_ms.
        steal_share: time that the hypervisor gave to others, of all cores' time; null where the system does not tell.
        other_share: processor time of other processes, of all cores' time.
        load: one-minute load average at the start.
    """

    spin_ms: tuple[float, ...] = ()
    spin_spread: float | None = None
    steal_share: float | None = None
    other_share: float | None = None
    load: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def noisy(self) -> bool:
        """Whether figures of this run should be doubted."""
        return bool(self.reasons)


@dataclass(frozen=True)
class Chunk:
    """Raw sample: one chunk of one repetition.

    Attributes:
        frames: pictures that came out.
        past_frames: latent frames that it looked back on, the reference not counted.
        wall_ms: since the chunk before was ready; of the first chunk, since the first push.
        push_ms: of every driving frame that was taken for it, in order; the last one gave the pictures.
        stage_ms: wall time by stage.
        arrival_ms: of every driving frame whose picture is in the chunk, from when it was taken until that was there; where stages
            overlap, since there it does not follow from `push_ms`.
    """

    frames: int
    past_frames: int
    steady: bool
    wall_ms: float
    push_ms: tuple[float, ...]
    stage_ms: Mapping[str, float]
    arrival_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Repetition:
    """Raw samples of one clip, from `set_reference` on.

    Attributes:
        order: place in the interleaved sequence of all rows of the case, 0-based: neighbours ran one after another.
        started_s: since the run began.
        spin_ms: a fixed amount of arithmetic, timed just before.
        reference_ms: `set_reference`.
        first_frame_ms: from the beginning of `set_reference` to the first picture, driving frames handed over without delay.
            Both are null for peers that make no pictures.
    """

    order: int
    started_s: float
    spin_ms: float
    reference_ms: float | None
    first_frame_ms: float | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Summary:
    """Percentiles of `count` samples, ms.

    low and high bound the median with 95 % confidence: order statistics of the repetitions' medians, since the samples of a
    repetition are not independent. With fewer than 6 repetitions there is no such interval: then they are the smallest and the
    largest sample.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Three tellings of the steady chunks (module docstring), the first chunk, and the time to the first frame."""

    per_frame: Summary
    per_chunk: Summary
    arrival: Summary
    arrival_fps: float | None
    first_frame: Summary
    first_chunk: Summary
    throughput_fps: float  # frames over wall time, of steady chunks
    target_fps: float
    deadline_misses: float  # share of frames, 0..1


@dataclass(frozen=True)
class Work:
    """What a stage's graphs do in a steady chunk, counted from the ONNX (benchmarks/flops.py).

    Attributes:
        flops: a multiplication and an addition are two.
        flops_by_kind: linear, attention, conv, elementwise.
        bytes: weights, inputs and outputs of the graphs, each once: what has to be moved even if all fits in the caches in between.
        node_bytes: inputs and outputs of every node: what is moved when nothing stays in the caches.
    """

    flops: float
    flops_by_kind: Mapping[str, float]
    bytes: float
    node_bytes: float


@dataclass(frozen=True)
class Stage:
    """One stage over the steady chunks.

    Attributes:
        per_chunk: wall time in a chunk, ms.
        share: of the chunk's wall time, 0..1.
        work: null for stages that run no graph, and for graphs that were not counted.
        precision: whose matrix rate bounds it.
        limit_ms: the larger of flops / matrix rate and bytes / copy bandwidth.
        bound: "compute" or "memory", whichever is larger.
        fraction: limit_ms over the median; 1 is the physical limit.
    """

    name: str
    per_chunk: Summary
    share: float
    work: Work | None = None
    precision: str | None = None
    limit_ms: float | None = None
    bound: str | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Span:
    """When a stage ran in one chunk, ms since the chunk before was ready."""

    stage: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Memory:
    """Highest use. host: resident size of the row's process, everything in it counted; device: allocated by the process."""

    host_peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    cache_bytes: int | None = None  # of the K/V caches
    weight_bytes: int | None = None


@dataclass(frozen=True)
class Startup:
    """Before the first frame.

    Attributes:
        load_s: reading, checking and loading the graphs, files in the system's cache.
        build_s: compiling them (TensorRT, torch.compile), where a back end does.
        cold_start_s: from the start of a fresh process to its first picture, Python and imports included.
    """

    load_s: float | None = None
    build_s: float | None = None
    cold_start_s: float | None = None


@dataclass(frozen=True)
class Energy:
    """Of the GPUs, by NVML's counter, over whole repetitions."""

    per_frame_j: float
    mean_w: float


@dataclass(frozen=True)
class Sweep:
    """The row is a point of a scaling curve: `axis` is frames, resolution, window, steps or threads."""

    curve: str
    axis: str
    value: float


@dataclass(frozen=True)
class Result:
    """One case on one peer.

    Attributes:
        key: CASE/PEER; compare and history match rows of different reports by it and by `config`.
        config: the case's fields after defaults, as in its TOML.
        source_key: of the bundle (its manifest's); pareto matches quality reports by it.
        status: of STATUSES; `reason` says why where it is not "ok". An interrupted row keeps the repetitions that it has.
        latency: null for a peer that measures some stages alone.
        execution: "serial" or "overlapped".
        accounted: sum of the stages but `other` over the wall time, steady chunks.
        waterfall: the stages of one steady chunk whose wall time is nearest the median.
        stopped: why no more repetitions were made: "narrow" (the interval), "cap" (repetitions), "time", or "interrupted".
    """

    key: str
    case: str
    peer: str
    config: Mapping[str, Any]
    status: str
    reason: str = ""
    sweep: Sweep | None = None
    execution: str = "serial"
    repetitions: tuple[Repetition, ...] = ()
    latency: Latency | None = None
    stages: tuple[Stage, ...] = ()
    accounted: float | None = None
    occupancy: Mapping[str, float] = field(default_factory=dict)
    critical_path: tuple[str, ...] = ()
    waterfall: tuple[Span, ...] = ()
    memory: Memory = field(default_factory=Memory)
    startup: Startup = field(default_factory=Startup)
    energy: Energy | None = None
    noise: Noise = field(default_factory=Noise)
    stopped: str = ""
    notes: tuple[str, ...] = ()
    source_key: str | None = None


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        interrupted: somebody stopped it, and rows may be missing.
        turns: a name that two reports share when their repetitions took turns; compare then pairs them.
    """

    created: str  # ISO 8601, UTC
    command: tuple[str, ...]
    scope: str
    machine: Machine
    code: Code
    versions: Mapping[str, str]
    limits: tuple[Limits, ...]
    noise: Noise
    results: tuple[Result, ...]
    seconds: float
    interrupted: bool = False
    turns: str | None = None
    kind: str = KIND
    schema: int = SCHEMA


def to_json(report: Report) -> str:
    """The file's text, a line per result; numbers keep six significant digits, of a second that is a microsecond."""

    def line(value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
        return json.dumps(rounded, separators=(",", ":"))

    data = asdict(report)
    results = ",\n".join(line(result) for result in data.pop("results"))
    rest = ",\n".join(f"{json.dumps(name)}:{line(value)}" for name, value in data.items())
    return f'{{{rest},\n"results":[\n{results}\n]}}\n'


def write_report(path: str | Path, report: Report) -> Path:
    """Write the report to `path`, or to latency.json in the folder `path`; it appears when it is whole.

    Raises:
        UserError: the place cannot be written.
    """
    path = Path(path)
    path = path if path.suffix == ".json" else path / REPORT_FILE
    with whole_file(path) as temporary:
        temporary.write_text(to_json(report), encoding="utf-8")
    return path


def read_report(path: str | Path) -> Report:
    """Read a report: a file, or a folder with latency.json.

    Raises:
        UserError: missing, unreadable, not a report, of an older or newer schema, or incomplete.
    """
    path = Path(path)
    path = path / REPORT_FILE if path.is_dir() else path
    action = "make it again with fp-bench run"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"report {path}", expected="a file made by fp-bench run", found="no such file", action=action) from error
    except OSError as error:
        raise UserError(f"report {path}", expected="a readable file", found=error.strerror or str(error), action=action) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"report {path}", expected="JSON", found=str(error), action=action) from error
    kind = data.get("kind") if isinstance(data, dict) else None
    schema = data.get("schema") if isinstance(data, dict) else None
    if kind != KIND or not isinstance(schema, int) or isinstance(schema, bool):
        found = "something else" if kind is None else f"kind {kind!r}, schema {schema!r}"
        raise UserError(f"report {path}", expected="a report of fp-bench run", found=found, action=action)
    if schema != SCHEMA:
        hint = "update factorportrait" if schema > SCHEMA else f"it is of an older version: {action}"
        raise UserError(f"report {path}", expected=f"schema {SCHEMA}", found=f"schema {schema}", action=hint)
    try:
        return config_from_dict(Report, data, f"report {path}")
    except CheckpointError as error:
        raise UserError(error.what, expected=error.expected, found=error.found, action=action) from error
