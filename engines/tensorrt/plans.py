"""The store of plans: one folder per plan, named by what the plan was made from.

<plans>/<stage>-<key>/plan.engine   what TensorRT loads
<plans>/<stage>-<key>/plan.json     what it was made from and when
<plans>/build.lock                  held by whoever builds; timings of two builds on one GPU would disturb each other
<plans>/timing-<machine>.cache      times that TensorRT measured, reused by later builds

A folder appears under its name only when it is whole, so a killed build leaves nothing that would be taken for a plan.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.engines.tensorrt.machine import INSTALL_HINT, Machine
from factorportrait.engines.tensorrt.profiles import Profile, profiles_of
from factorportrait.errors import UserError
from factorportrait.files import whole_file, whole_folder, write_error
from factorportrait.shipped import cache_folder

PLAN, METADATA, LOCK = "plan.engine", "plan.json", "build.lock"
KEY_DIGITS = 16
ANY_MINOR = ".x"  # in the version of a plan that all versions of one major load
_NAME = rf"\w+-[0-9a-f]{{{KEY_DIGITS}}}"
_FOLDER = re.compile(_NAME)
_LEFT_OVER = re.compile(rf"\.{_NAME}\..*\.(part|old)|{_NAME}\.log|\.timing-.*\.part\.cache")
# In front of a timing cache lies its digest: TensorRT is never given a torn one.
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        optimization_level: 0 (fast build) to 5 (fast plan); TensorRT's own default is 3.
        workspace_bytes: scratch memory that a layer may use; None for 80 % of what is free on the GPU.
        version_compatible: the plan carries the lean runtime, so later versions of TensorRT 11 load it too; it may be slower.
    """

    optimization_level: int = 3
    workspace_bytes: int | None = None
    version_compatible: bool = False


@dataclass(frozen=True)
class Parts:
    """Everything that a plan depends on; a plan is used only where all of it is equal."""

    graph: str
    profile: str
    tensorrt: str
    gpu: str
    sm: str
    os: str
    flags: str

    @property
    def key(self) -> str:
        """Digest of the parts."""
        return _digest(asdict(self))[:KEY_DIGITS]

    def differences(self, other: Parts) -> str:
        """What is another one in `self` than in `other`, for people."""
        said = []
        for part in fields(self):
            old, new = getattr(other, part.name), getattr(self, part.name)
            if old != new and part.name in ("graph", "profile"):
                said.append({"graph": "the graph has changed", "profile": "the sizes to build for have changed"}[part.name])
            elif old != new:
                said.append(f"{_PART_NAMES[part.name]} was {old or 'none'}, is {new or 'none'}")
        return "; ".join(said)


_PART_NAMES = {"tensorrt": "TensorRT", "gpu": "the GPU", "sm": "its compute capability", "os": "the system", "flags": "the flags"}


@dataclass(frozen=True)
class Plan:
    """A plan of the store."""

    folder: Path
    stage: str
    bundle: str
    parts: Parts
    bytes: int
    built: float  # seconds since 1970
    seconds: float  # that the build took

    @property
    def file(self) -> Path:
        return self.folder / PLAN

    @property
    def version_compatible(self) -> bool:
        """Whether later versions of TensorRT load it, too."""
        return self.parts.tensorrt.endswith(ANY_MINOR)

    @property
    def age_s(self) -> float:
        return time.time() - self.built


@dataclass(frozen=True)
class Request:
    """A plan that is wanted: a stage of a bundle, for a machine."""

    bundle: Bundle
    spec: StageSpec
    machine: Machine
    options: Options = field(default_factory=Options)

    @property
    def profiles(self) -> list[Profile]:
        return profiles_of(self.spec, self.bundle.config)

    @property
    def parts(self) -> Parts:
        manifest, machine, options = self.bundle.manifest, self.machine, self.options
        version = machine.tensorrt
        if options.version_compatible:
            version = version.split(".")[0] + ANY_MINOR
        flags = {"version_compatible": options.version_compatible, "optimization_level": options.optimization_level}
        if options.workspace_bytes is not None:
            flags["workspace_bytes"] = options.workspace_bytes
        return Parts(
            graph=_digest({name: manifest.files[name].sha256 for name in self.spec.files}),
            profile=_digest([asdict(profile) for profile in self.profiles]),
            tensorrt=version,
            gpu=machine.gpu,
            sm=machine.sm,
            os=machine.os,
            flags=", ".join(f"{name} {value}" for name, value in flags.items()),
        )


@dataclass(frozen=True)
class Status:
    """Whether a plan can be used here: "current", "stale", or "unknown" where this machine cannot tell; and why."""

    state: str
    reason: str = ""


class PlanStore:
    """Plans of one folder; None for the user's cache."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else cache_folder() / "plans"

    def path(self, request: Request) -> Path:
        """Where the plan lies, or will."""
        return self.folder / f"{request.spec.name}-{request.parts.key}"

    def find(self, request: Request) -> Plan | None:
        """The plan for exactly this request, if there is a whole one."""
        plan = read_plan(self.path(request))
        return plan if plan is not None and plan.parts == request.parts else None

    def find_any(self, request: Request) -> Plan | None:
        """The latest plan for this request, whatever flags it was built with: those are the choice of who built it."""
        wanted = [replace(request, options=Options(version_compatible=compatible)).parts for compatible in (False, True)]
        plans = (plan for plan in self.plans() if plan.stage == request.spec.name)
        fitting = [plan for plan in plans if any(replace(parts, flags=plan.parts.flags) == plan.parts for parts in wanted)]
        return max(fitting, key=lambda plan: plan.built, default=None)

    def why_missing(self, request: Request) -> str:
        """Why a plan has to be built: none yet, or what differs from the latest plan of this stage of this bundle."""
        bundle = str(request.bundle.path.resolve())
        others = [plan for plan in self.plans() if plan.stage == request.spec.name and plan.bundle == bundle]
        if not others:
            return "no plan yet"
        latest = max(others, key=lambda plan: plan.built)
        return request.parts.differences(latest.parts) or "the plan was removed"

    def get(
        self,
        request: Request,
        build: Callable[[Path], None],
        *,
        again: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> tuple[Plan, bool]:
        """The plan, and whether it was built now.

        Args:
            request: what is wanted.
            build: writes the plan to the path that it is given.
            again: build though there is a plan.
            on_wait: called once if another process builds.

        Raises:
            UserError: the folder cannot be written, or the build failed.
        """
        started = time.time()
        if not again and (plan := self.find(request)) is not None:
            return plan, False
        with self.lock(on_wait):
            # Who held the lock may have built it meanwhile.
            plan = self.find(request)
            if plan is not None and (not again or plan.built > started):
                return plan, False
            begin = time.perf_counter()
            with whole_folder(self.path(request)) as folder:
                build(folder / PLAN)
                metadata = {
                    "stage": request.spec.name, "bundle": str(request.bundle.path.resolve()), "parts": asdict(request.parts),
                    "bytes": (folder / PLAN).stat().st_size, "built": time.time(),
                    "seconds": round(time.perf_counter() - begin, 3),
                }  # fmt: skip
                (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        plan = self.find(request)
        if plan is None:
            raise UserError(
                f"plan {self.path(request)}", expected="what was just built", found="something else",
                action="is another program writing there? choose another folder with --plans",
            )  # fmt: skip
        return plan, True

    @contextlib.contextmanager
    def lock(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the store alone. The system releases the lock of a process that dies."""
        path = self.folder / LOCK
        try:
            import filelock  # late: looking at plans needs no lock, and only the extra brings the package
        except ImportError as error:
            raise UserError(
                f"locking {self.folder}", expected="the package filelock", found="none", action=INSTALL_HINT
            ) from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                on_wait()
                lock.acquire()
        except OSError as error:
            raise write_error(path, error) from error
        try:
            yield
        finally:
            lock.release()

    def plans(self) -> list[Plan]:
        """All whole plans, by name."""
        folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [plan for folder in folders if (plan := read_plan(folder)) is not None]

    def left_overs(self) -> list[Path]:
        """What killed and failed builds left, logs included. Ask only while holding the lock: a running build looks the same."""
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [
            path
            for path in paths
            if _LEFT_OVER.fullmatch(path.name) or _FOLDER.fullmatch(path.name) and read_plan(path) is None
        ]

    def timing_caches(self) -> list[Path]:
        """The times that TensorRT measured, of all machines."""
        return sorted(self.folder.glob("timing-*.cache"))

    def remove(self, path: Path) -> None:
        """Delete a plan or what a build left."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def timing_cache(self, machine: Machine) -> Path:
        """File of the times that TensorRT measured on such a machine."""
        return self.folder / f"timing-{_digest(asdict(machine))[:KEY_DIGITS]}.cache"


def status_of(plan: Plan, machine: Machine | None) -> Status:
    """Whether a plan can be used: its bundle still has that graph, and `machine` is the one that it was built for.

    Args:
        plan: of the store.
        machine: this machine; None where there is no GPU or no TensorRT, so that nobody can tell.
    """
    try:
        bundle = Bundle(plan.bundle)
        spec = bundle.stage(plan.stage, "tensorrt")
    except (UserError, OSError):
        return Status("stale", f"no bundle with this stage at {plan.bundle}")
    known = machine or Machine(plan.parts.tensorrt, plan.parts.gpu, plan.parts.sm, plan.parts.os)
    wanted = Request(bundle, spec, known, Options(version_compatible=plan.version_compatible)).parts
    # As for `find_any`: any flags will do.
    reason = replace(wanted, flags=plan.parts.flags).differences(plan.parts)
    if reason:
        return Status("stale", reason)
    return Status("current") if machine else Status("unknown", "no GPU or no TensorRT here")


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder, None if it is no whole one."""
    if not _FOLDER.fullmatch(folder.name):
        return None
    try:
        data = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        plan = Plan(
            folder, str(data["stage"]), str(data["bundle"]), Parts(**data["parts"]), int(data["bytes"]), float(data["built"]),
            float(data["seconds"]),
        )  # fmt: skip
        return plan if plan.file.stat().st_size == plan.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_timing_cache(path: Path) -> tuple[bytes, str]:
    """The times of earlier builds and, where there are none that can be trusted, what was wrong with the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"timing cache {path} cannot be read ({error.strerror}); measuring again"
    digest, times = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(times).digest() != digest:
        return b"", f"timing cache {path} is truncated or no timing cache of this program; measuring again"
    return times, ""


def write_timing_cache(path: Path, times: bytes) -> None:
    """Replace the times of earlier builds; to be called by the holder of the store's lock."""
    with whole_file(path) as temporary:
        temporary.write_bytes(hashlib.sha256(times).digest() + times)


def _digest(data: Mapping | list) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
