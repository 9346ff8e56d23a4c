"""What the measurement runs on: description, versions, git state, and how quiet the machine is while it runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import factorportrait
from factorportrait.benchmarks.schema import Code, Gpu, Machine, Noise
from factorportrait.runtime.doctor import CPU_FLAGS

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "torch", "onnx", "diffusers", "av", "nvidia-ml-py",
)  # fmt: skip
SPIN_ROUNDS = 100_000


def describe_machine(before: Machine | None = None) -> Machine:
    """The machine as it is now; with `before`, its description at the start, clocks and throttle reasons of both."""
    cpuinfo = _cpuinfo()
    words = set(cpuinfo.get("flags", [""])[0].split())
    mhz = [float(value) for value in cpuinfo.get("cpu MHz", [])]
    machine = Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpuinfo.get("model name", [platform.processor() or "unknown"])[0],
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in words),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cpu_mhz=(round(sum(mhz) / len(mhz), 1),) if mhz else (),
        gpus=tuple(_gpus()),
    )
    if before is None:
        return machine
    gpus = tuple(
        replace(now, throttle_reasons=tuple(dict.fromkeys((*then.throttle_reasons, *now.throttle_reasons))))
        for then, now in zip(before.gpus, machine.gpus, strict=False)
    )
    return replace(machine, cpu_mhz=before.cpu_mhz + machine.cpu_mhz, gpus=gpus)


def _cpuinfo() -> dict[str, list[str]]:
    """/proc/cpuinfo: every value of every key; empty where there is none."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), []).append(value.strip())
    return found


@contextlib.contextmanager
def nvml():
    """NVIDIA's management library, or None where there is no GPU or no nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, or no permission: all mean that there is nothing to read
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _gpus() -> Iterable[Gpu]:
    with nvml() as library:
        for index in range(library.nvmlDeviceGetCount() if library else 0):
            yield _gpu(library, library.nvmlDeviceGetHandleByIndex(index))


def _gpu(library, handle) -> Gpu:
    clock = library.NVML_CLOCK_SM
    return Gpu(
        name=_text(library.nvmlDeviceGetName(handle)),
        driver=_text(library.nvmlSystemGetDriverVersion()),
        memory_bytes=library.nvmlDeviceGetMemoryInfo(handle).total,
        sm_clock_mhz=_asked(library, lambda: library.nvmlDeviceGetClockInfo(handle, clock)),
        max_sm_clock_mhz=_asked(library, lambda: library.nvmlDeviceGetMaxClockInfo(handle, clock)),
        power_limit_w=_asked(library, lambda: library.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
        throttle_reasons=_throttle_reasons(library, handle),
    )


def _throttle_reasons(library, handle) -> tuple[str, ...]:
    """Names of what holds the clocks down; an idle GPU and clocks set on purpose are not among them."""
    names = {
        "SwPowerCap": "power limit", "HwSlowdown": "hardware slowdown", "SyncBoost": "sync boost",
        "SwThermalSlowdown": "temperature (software)", "HwThermalSlowdown": "temperature (hardware)",
        "HwPowerBrakeSlowdown": "power brake",
    }  # fmt: skip
    bits = _asked(library, lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    return tuple(text for name, text in names.items() if bits & getattr(library, f"nvmlClocksThrottleReason{name}", 0))


def _asked(library, question):
    """The answer, or None where this GPU gives none."""
    try:
        return question()
    except library.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def gpu_energy_j(library) -> float | None:
    """Joules of all GPUs since the driver was loaded; None where they do not count."""
    if library is None:
        return None
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
    values = [_asked(library, lambda handle=handle: library.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]
    return sum(values) / 1000 if values and None not in values else None


def gpu_memory_bytes(library) -> int | None:
    """Device memory of this process on all GPUs."""
    if library is None:
        return None
    total = 0
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        for process in _asked(library, lambda handle=handle: library.nvmlDeviceGetComputeRunningProcesses(handle)) or ():
            if process.pid == os.getpid() and process.usedGpuMemory:
                total += process.usedGpuMemory
    return total or None


def versions() -> dict[str, str]:
    """Python and the packages that decide times, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_code() -> Code:
    """Version and git state of the running program."""
    version = importlib.metadata.version("factorportrait")
    # In a checkout the package's own files are tracked; a wheel inside somebody's repository is none of its commits.
    folder = Path(factorportrait.__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return Code(version)
    status = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return Code(
        version, _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD"), bool(status),
        _git(folder, "show", "-s", "--format=%cI", "HEAD"),
    )  # fmt: skip


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def spin_ms() -> float:
    """Milliseconds of a fixed amount of arithmetic on one core."""
    start = time.perf_counter_ns()
    value = 1
    for _ in range(SPIN_ROUNDS):
        value = value * 48271 % 2147483647
    return 1e-6 * (time.perf_counter_ns() - start)


@dataclass
class Usage:
    """Processor seconds of the whole machine and of this process, added up over the times that a row ran."""

    total_s: float = 0.0
    steal_s: float = 0.0
    busy_s: float = 0.0
    own_s: float = 0.0

    @contextlib.contextmanager
    def watch(self):
        """Count what happens inside."""
        before, own = _stat(), time.process_time()
        yield
        after = _stat()
        if before and after:
            total, busy, steal = (now - then for now, then in zip(after, before, strict=True))
            self.total_s += total
            self.busy_s += busy
            self.steal_s += steal
            self.own_s += time.process_time() - own


def _stat() -> tuple[float, float, float] | None:
    """Seconds of all cores together since boot: all, busy (without steal), steal. None where /proc/stat is missing."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    busy = user + nice + system + irq + softirq
    return busy + idle + iowait + steal, busy, steal


def noise_of(spins: Sequence[float], usage: Usage | None, load: float | None) -> Noise:
    """Judge by noise.toml.

    Args:
        spins: results of `spin_ms`.
        usage: of the processes that were measured; None where nobody counted.
        load: one-minute load average before the run.
    """
    spread = None
    if len(spins) > 1:
        low, middle, high = np.percentile(spins, [10, 50, 90])
        spread = float((high - low) / middle)
    counted = usage is not None and usage.total_s > 0
    steal = usage.steal_s / usage.total_s if counted else None
    other = max(0.0, usage.busy_s - usage.own_s) / usage.total_s if counted else None
    limits = {name: entry["value"] for name, entry in tomllib.loads(_NOISE.read_text(encoding="utf-8")).items()}
    cores = len(os.sched_getaffinity(0))
    reasons = []
    if spread is not None and spread > limits["spin_spread"]:
        reasons.append(f"equal work took times that differ by {spread:.0%}")
    if steal is not None and steal > limits["steal_share"]:
        reasons.append(f"the hypervisor gave {steal:.1%} of the processor time to others")
    if other is not None and other > limits["other_share"]:
        reasons.append(f"other processes took {other:.0%} of the processor time")
    if load is not None and load > limits["load"] * cores:
        reasons.append(f"the load average was {load:.1f} on {cores} cores when the run began")
    return Noise(tuple(spins), spread, steal, other, load, tuple(reasons))


_NOISE = Path(__file__).with_name("noise.toml")


def load_average() -> float | None:
    """Over the last minute; None where the system keeps none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
