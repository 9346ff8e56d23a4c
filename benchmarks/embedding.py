"""Fused embedding against PyTorch and against the machine: `python -m factorportrait.benchmarks.embedding`.

All ways compute the same tokens from the same cameras and pose latents, interleaved round by round:

* plain: rays in float32, pack, concatenate with zero reference and noise, Conv3d;
* hoisted: only camera and pose channels, rays concatenated with the latents, Conv2d per latent frame;
* linear: the same, patches unfolded and multiplied with `F.linear`;
* compiled: `linear` through `torch.compile` (left out, with a line that says so, where there is no C++ compiler for it);
* fused: `factorportrait.runtime.embedding`.

The roofline is the slower of two things that this run measures on its own: the matrix product with the inputs of a
token that the definition has (`torch.mm` of [tokens, 4 * (camera + pose channels)]), and writing the output.
The fused way folds the camera's weights, so its product is smaller: the roofline of the folded product (`torch.mm` of
its own size) stands beside it. On a machine that does other work, take `--threads 1` and the processor time.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from factorportrait.runtime.embedding import FusedEmbedding, implementation

LATENT_CHANNELS = 16
TORCH_WAYS = ("plain", "hoisted", "linear", "compiled")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[3, 22])
    parser.add_argument(
        "--camera", type=int, nargs="+", choices=(6, 24), default=[24, 6], help="channels of the camera"
    )
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--peak", choices=(*TORCH_WAYS, "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        print(peak_bytes(options))
        return 0
    report = {
        "threads": options.threads,
        "implementation": implementation(),
        "processor": platform.processor(),
        "cases": [],
    }
    for camera in options.camera:
        for slots in options.slots:
            case = measure(slots, camera, options)
            report["cases"].append(case)
            print_case(case)
    text = json.dumps(report)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def make_inputs(slots: int, camera: int, size: int, dim: int) -> dict:
    """weight [D,C,1,2,2], bias [D], K [4N,3,3] (one lens), c2w [4N,4,4] (an orbit), pose [16,N,h,w]."""
    rng = np.random.default_rng(0)
    frames, cells = 4 * slots, size // 8
    angle = np.linspace(-0.5, 0.5, frames)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 0, 0], c2w[:, 0, 2], c2w[:, 2, 0], c2w[:, 2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    c2w[:, :3, 3] = -c2w[:, :3, 2] * 1.2
    K = np.tile(np.array([[2.0 * size, 0, size / 2], [0, 2.0 * size, size / 2], [0, 0, 1]]), (frames, 1, 1))
    channels = {"reference": LATENT_CHANNELS, "noise": LATENT_CHANNELS, "camera": camera, "pose": LATENT_CHANNELS}
    weight = rng.standard_normal((dim, sum(channels.values()), 1, 2, 2)).astype(np.float32) * 0.05
    pose = rng.standard_normal((LATENT_CHANNELS, slots, cells, cells)).astype(np.float32)
    return {
        "weight": weight,
        "bias": rng.standard_normal(dim).astype(np.float32),
        "channels": channels,
        "K": K,
        "c2w": c2w,
        "pose": pose,
    }


def torch_ways(inputs: dict, stride: int = 8) -> dict[str, Callable[[], object]]:
    """Each returns [N*T, D] and starts from the cameras."""
    import torch
    from torch.nn import functional as F

    torch._dynamo.reset()  # it compiles a function for eight sizes, and the ninth runs uncompiled
    weight, bias, pose = (torch.from_numpy(inputs[name]) for name in ("weight", "bias", "pose"))
    K, c2w = torch.from_numpy(inputs["K"]).float(), torch.from_numpy(inputs["c2w"]).float()
    camera = inputs["channels"]["camera"]
    slots, cells = pose.shape[1], pose.shape[2]
    condition_weight = weight[:, 2 * LATENT_CHANNELS :, 0].contiguous()
    flat_weight = condition_weight.flatten(1).contiguous()
    centre = (torch.arange(cells) + 0.5) * stride
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # [3,h*w]

    def rays() -> torch.Tensor:  # [N,camera,h,w]
        picked = (K, c2w) if camera == 24 else (K[3::4], c2w[3::4])
        directions = F.normalize(picked[1][:, :3, :3] @ torch.linalg.inv(picked[0]) @ pixels, dim=1)
        origins = picked[1][:, :3, 3:].expand_as(directions)
        return torch.cat([torch.linalg.cross(origins, directions, dim=1), directions], 1).view(
            slots, camera, cells, cells
        )

    def plain() -> torch.Tensor:
        zero = torch.zeros(1, 2 * LATENT_CHANNELS, slots, cells, cells)
        stacked = torch.cat([zero, rays().transpose(0, 1)[None], pose[None]], 1)
        return F.conv3d(stacked, weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2).contiguous()[0]

    def hoisted() -> torch.Tensor:
        stacked = torch.cat([rays(), pose.transpose(0, 1)], 1)
        return F.conv2d(stacked, condition_weight, bias, stride=2).flatten(2).transpose(1, 2).reshape(-1, len(bias))

    def linear() -> torch.Tensor:
        stacked = torch.cat([rays(), pose.transpose(0, 1)], 1)
        patches = (
            stacked.view(slots, -1, cells // 2, 2, cells // 2, 2)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, flat_weight.shape[1])
        )
        return F.linear(patches, flat_weight, bias)

    return dict(zip(TORCH_WAYS, (plain, hoisted, linear, torch.compile(linear, dynamic=False)), strict=True))


def make_fused(inputs: dict, threads: int) -> FusedEmbedding:
    cells = inputs["pose"].shape[-1]
    return FusedEmbedding(
        inputs["weight"],
        inputs["bias"],
        channels=inputs["channels"],
        latent_height=cells,
        latent_width=cells,
        num_threads=threads,
    )


def measure(slots: int, camera: int, options: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(options.threads)
    inputs = make_inputs(slots, camera, options.size, options.dim)
    fused = make_fused(inputs, options.threads)
    tokens = slots * fused.tokens_per_frame
    single, half = np.empty((tokens, options.dim), np.float32), np.empty((tokens, options.dim), np.float16)
    depth, folded_depth = 4 * (camera + LATENT_CHANNELS), 4 * (3 + LATENT_CHANNELS)
    product = torch.empty(tokens, options.dim)
    left, right = torch.randn(tokens, depth), torch.randn(depth, options.dim)
    folded_left, folded_right = left[:, :folded_depth].contiguous(), right[:folded_depth].contiguous()

    def embed(out: np.ndarray | None) -> Callable[[], object]:
        return lambda: fused.embed_chunk(inputs["K"], inputs["c2w"], inputs["pose"], out=out)

    ways = torch_ways(inputs)
    with torch.inference_mode():
        expected = ways["plain"]().numpy()
        try:
            largest = float(np.abs(ways["compiled"]().numpy() - expected).max())
            if not largest <= 1e-3 * np.abs(expected).max():
                raise RuntimeError(f"torch.compile's tokens differ from the plain ones by {largest}")
        except torch._inductor.exc.InductorError as error:
            print(f"no row compiled: {str(error).splitlines()[0]}")
            del ways["compiled"]
        formulations = tuple(ways)
        error = float(np.abs(embed(None)() - expected).max() / np.abs(expected).max())
        reused = embed(None)()  # on a 64-byte line, as torch's own
        ways |= {
            "fused": embed(None),
            "fused_out": embed(reused),
            "fused_out_unaligned": embed(single),
            "fused_half_out": embed(half),
            "product": lambda: torch.mm(left, right, out=product),
            "folded_product": lambda: torch.mm(folded_left, folded_right, out=product),
            "write": lambda: product.fill_(1.0),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for round_idx in range(options.rounds + 2):
            for name, way in ways.items():
                start, start_processor = time.perf_counter(), time.process_time()
                way()
                if round_idx >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
                    processor[name].append((time.process_time() - start_processor) * 1e3)
    median_ms = {name: statistics.median(values) for name, values in times.items()}
    processor_ms = {name: statistics.median(values) for name, values in processor.items()}
    best_ms = {name: min(values) for name, values in times.items()}

    def share(bests: dict[str, float], product_name: str) -> float:
        return max(bests[product_name], bests["write"]) / bests["fused_out"]

    best_torch = min(formulations, key=median_ms.__getitem__)
    peaks = {name: run_peak(name, slots, camera, options) for name in (*formulations, "fused")}
    return {
        "slots": slots,
        "camera_channels": camera,
        "tokens": tokens,
        "dim": options.dim,
        "error_vs_plain_float32": error,
        "median_ms": median_ms,
        "best_ms": best_ms,
        "processor_ms": processor_ms,  # median of all threads together
        "best_torch": best_torch,
        "times_plain": median_ms["plain"] / median_ms["fused"],
        "times_best_torch": median_ms[best_torch] / median_ms["fused"],
        "roofline_share": share(median_ms, "product"),
        "folded_roofline_share": share(median_ms, "folded_product"),
        "folded_roofline_share_best": share(best_ms, "folded_product"),
        "roofline_share_processor": share(processor_ms, "product"),
        "folded_roofline_share_processor": share(processor_ms, "folded_product"),
        "folded_gflops": 2e-6 * tokens * folded_depth * options.dim / median_ms["fused_out"],
        "peak_bytes": peaks,
    }


def run_peak(name: str, slots: int, camera: int, options: argparse.Namespace) -> int | None:
    """Growth of the largest resident size by one call, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "factorportrait.benchmarks.embedding",
        "--peak",
        name,
        "--slots",
        str(slots),
        "--camera",
        str(camera),
    ]
    command += ["--size", str(options.size), "--dim", str(options.dim), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def peak_bytes(options: argparse.Namespace) -> int:
    """Bytes by which one call raises this process's resident size at its highest, its output included. Linux only."""
    slots, camera = options.slots[0], options.camera[0]
    small, inputs = (make_inputs(n, camera, size, options.dim) for n, size in ((1, 32), (slots, options.size)))

    def way(inputs: dict) -> Callable[[], object]:
        if options.peak == "fused":
            fused = make_fused(inputs, options.threads)
            return lambda: fused.embed_chunk(inputs["K"], inputs["c2w"], inputs["pose"])
        import torch

        torch.set_num_threads(options.threads)
        return torch_ways(inputs)[options.peak]

    def resident(field: str) -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {field} in /proc/self/status")

    way(small)()  # libraries load and start their threads outside of the measurement
    call = way(inputs)
    if options.peak == "compiled":
        call()  # the compiler's own memory is not the call's; so this is the growth by the second call
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the highest size starts again from the present one
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def print_case(case: dict) -> None:
    print(f"{case['slots']} slots, {case['camera_channels']} camera channels, dim {case['dim']}; ms: median, best, CPU")
    for name, value in case["median_ms"].items():
        peak = case["peak_bytes"].get(name)
        memory = f"  peak +{peak / 2**20:.0f} MiB" if peak is not None else ""
        print(f"  {name:20s} {value:9.2f} {case['best_ms'][name]:9.2f} {case['processor_ms'][name]:9.2f}{memory}")
    print(f"  {case['times_plain']:.1f}x plain, {case['times_best_torch']:.1f}x {case['best_torch']}")
    print(
        f"  roofline: {case['roofline_share']:.0%}, by CPU time {case['roofline_share_processor']:.0%}; "
        f"of the folded product: {case['folded_roofline_share']:.0%}, {case['folded_roofline_share_processor']:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
