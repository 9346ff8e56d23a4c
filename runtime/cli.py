"""fp-run: a portrait and something to drive it -> a video."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

from factorportrait.bundle import PRECISIONS
from factorportrait.command import run_command
from factorportrait.errors import UserError
from factorportrait.model_config import SOLVERS
from factorportrait.runtime.cache import KINDS
from factorportrait.runtime.embedding import KINDS as EMBEDDINGS
from factorportrait.runtime.loop import COMMITS, HOISTS
from factorportrait.runtime.pipeline import OVERLAPS, Behind, default_threads
from factorportrait.shipped import DEMO_NAME, default_bundle_path, demo_bundle_is_current, shipped_inputs

WRITTEN_BEHIND = 16  # pictures that wait for the video encoder
# Options that some engines alone look at, and those that streams alone do: given in vain, they are refused.
ENGINES_OF = {
    "threads": ("onnxruntime-cpu", "torch"), "no_spin": ("onnxruntime-cpu",), "checkpoint": ("torch",), "device": ("torch",),
    "plans": ("tensorrt",),
}  # fmt: skip
OF_STREAMS = ("chunk", "window", "cache", "commit", "latency")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["doctor"]:
        options = doctor_parser().parse_args(argv[1:])
        from factorportrait.runtime.doctor import doctor

        return run_command("fp-run", lambda: doctor(as_json=options.json))
    arguments = parser().parse_args(argv)
    return run_command("fp-run", lambda: run(arguments))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp-run",
        description="Animate a portrait with a bundle made by fp-export. Without arguments: the shipped demo. "
        "`fp-run doctor` tells what this machine can do.",
    )
    parser.add_argument(
        "bundle", nargs="?", type=Path, help="bundle folder; default: the shipped demo, exported when needed"
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--portrait", type=Path, help="png, jpg or webp of any size; centre-cropped to the bundle's shape"
    )
    inputs.add_argument("--driving", type=Path, help="video, frame folder, clip folder, or ARKit .csv")
    inputs.add_argument("--expression-from", type=Path, help="take the expression from here instead")
    inputs.add_argument(
        "--pose-from", type=Path, help="take the head pose from here instead: mesh, normal maps or .csv"
    )
    inputs.add_argument("--control", type=Path, help="pose or control video in the place of normal maps (Wan-Fun, Wan-Animate)")
    inputs.add_argument(
        "--prompt-embeddings", type=Path, help="[tokens, width] as .safetensors or .npy (default: the bundle's prompt)"
    )
    inputs.add_argument("--negative-embeddings", type=Path, help="what guidance leads away from (default: the bundle's)")
    inputs.add_argument("--image-embeddings", type=Path, help="of the portrait, where the bundle has no picture encoder")
    inputs.add_argument("--camera", help="static, orbit:30, dolly:0.8, freeze:30, transforms.json or cameras.json")
    inputs.add_argument(
        "--fit", choices=("crop", "pad"), default="crop", help="how the portrait is fitted (default crop)"
    )
    inputs.add_argument(
        "--driving-crop", metavar="X,Y,W,H", help="face square in the driving picture (default: centred)"
    )
    inputs.add_argument("--frames", type=int, help="stop after so many frames")
    inputs.add_argument("--fps", help="resample the driving to this rate, such as 25 or 30000/1001")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", "-o", default="out.mp4", help="mp4, mkv, webm, or a folder for pictures (default out.mp4)"
    )
    output.add_argument("--side-by-side", action="store_true", help="reference | driving | output")
    output.add_argument("--no-sound", action="store_true", help="leave the driving's sound out")
    output.add_argument("--json", action="store_true", help="the last line is one JSON object with the figures")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--mode", choices=("clip", "stream"), help="default: stream where the checkpoint allows it")
    generation.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    generation.add_argument("--solver", choices=SOLVERS, help="of the ODE; costs the same (default: the checkpoint's)")
    generation.add_argument("--shift", type=float, metavar="X", help="of the steps towards noise (default: the checkpoint's)")
    generation.add_argument("--guidance", help="1 (off), 2.5, or expression=2,pose=1.5 (default: the checkpoint's, mostly 1)")
    generation.add_argument(
        "--expression-gain", type=float, default=1.0, metavar="X",
        help="how far expressions go: 2 doubles them, 0 is a neutral face (default 1); unlike guidance it costs no time",
    )  # fmt: skip
    generation.add_argument("--seed", type=int, default=0)
    generation.add_argument("--chunk", type=int, help="latent frames generated together (stream)")
    generation.add_argument("--window", type=int, help="latent frames that a chunk sees, itself included (stream)")
    cheaper = parser.add_argument_group("approximations", "faster, other pictures; off by default")
    cheaper.add_argument("--commit", choices=COMMITS, default=COMMITS[0], help="what later chunks see (stream; default clean)")
    cheaper.add_argument(
        "--step-cache", type=float, default=0.0, metavar="X",
        help="skip steps until the time embedding has changed by this share, such as 0.2 (default 0: none)",
    )  # fmt: skip
    cheaper.add_argument("--guidance-steps", type=int, metavar="N", help="guidance in the first N steps only (default: all)")
    machine = parser.add_argument_group("machine")
    aim = machine.add_mutually_exclusive_group()
    aim.add_argument(
        "--latency", action="store_true",
        help="first picture soonest (stream): a first chunk of one latent frame, and every core for one stage after the other",
    )  # fmt: skip
    aim.add_argument(
        "--throughput", action="store_true", help="most pictures per second (the default): files are read and written meanwhile"
    )  # fmt: skip
    machine.add_argument("--overlap", choices=("auto", *OVERLAPS), help="what runs at once (default auto; with --latency none)")
    machine.add_argument(
        "--engine", default="auto", metavar="NAME",
        help="auto (default), tensorrt, onnxruntime-cuda, onnxruntime-cpu or torch; fp-run doctor tells which run here",
    )  # fmt: skip
    machine.add_argument("--cache", choices=KINDS, default="auto", help="how keys and values are kept (stream; default auto)")
    machine.add_argument(
        "--embedding", choices=EMBEDDINGS, default="auto",
        help="who embeds pose and camera: the C++ extension (on a GPU CUDA kernels), or the bundle's graph (default auto, and the "
        "output says why)",
    )  # fmt: skip
    machine.add_argument(
        "--hoist", default="all", metavar="A,B",
        help=f"what is computed once instead of in every pass: all (default), none, or some of {', '.join(HOISTS)}; "
        "the same pictures",
    )  # fmt: skip
    machine.add_argument("--checkpoint", type=Path, help="the bundle's checkpoint, for --engine torch (default: the demo's)")
    machine.add_argument("--device", help="of --engine torch, such as cpu or cuda:0 (default: the GPU if there is one)")
    machine.add_argument("--plans", type=Path, metavar="DIR", help="folder of TensorRT plans (default: in the user's cache)")
    machine.add_argument("--threads", type=int, help="of one operator on the CPU (default: every core; half where stages overlap)")
    machine.add_argument(
        "--no-spin", action="store_true", help="CPU threads sleep while they wait: faster where other programs want the cores"
    )
    machine.add_argument("--eager", action="store_true", help="plain calls instead of bound buffers; the same pictures")
    machine.add_argument("--no-verify", action="store_true", help="do not compare the digests of the bundle's files")
    machine.add_argument("--verbose", "-v", action="store_true")
    return parser


def doctor_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp-run doctor", description="Tell what this machine can do and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="fp-run: %(message)s")
    check_numbers(arguments)
    if arguments.overlap is None:
        arguments.overlap = "none" if arguments.latency else "auto"
    bundle_path = arguments.bundle or demo_bundle()
    from factorportrait.bundle import Bundle
    from factorportrait.engines.choose import choose
    from factorportrait.runtime.inputs import open_inputs
    from factorportrait.runtime.media.driving import parse_fps
    from factorportrait.runtime.media.fit import crop_box
    from factorportrait.runtime.media.portrait import load_portrait
    from factorportrait.runtime.media.writer import VideoWriter
    from factorportrait.runtime.session import SessionOptions, open_bundle

    # Inputs are opened before the graphs are loaded: a wrong path should cost no seconds.
    bundle = Bundle(bundle_path)
    config = bundle.config
    options = SessionOptions(
        arguments.mode, arguments.steps, arguments.guidance, arguments.seed, arguments.chunk, arguments.window, arguments.cache,
        arguments.embedding, arguments.hoist, arguments.commit, arguments.step_cache, arguments.guidance_steps, arguments.overlap,
        arguments.latency, arguments.prompt_embeddings, arguments.negative_embeddings, arguments.image_embeddings,
        arguments.expression_gain, arguments.solver, arguments.shift,
    )  # fmt: skip
    mode = options.resolve(config).mode
    check_unused(arguments, choose(bundle, arguments.engine).name, mode)
    threads = arguments.threads or default_threads(arguments.overlap, mode)
    portrait = load_portrait(
        arguments.portrait or shipped_inputs() / "portrait.png", config.height, config.width, arguments.fit
    )
    driving = open_inputs(
        bundle,
        arguments.driving or default_driving(arguments),
        expression_from=arguments.expression_from,
        pose_from=arguments.pose_from,
        camera=arguments.camera,
        fps=parse_fps(arguments.fps) if arguments.fps is not None else None,
        num_frames=arguments.frames,
        driving_crop=crop_box(arguments.driving_crop) if arguments.driving_crop else None,
        control=arguments.control,
    )
    for note in driving.notes:
        print(f"fp-run: {note}")
    opened = open_bundle(
        bundle_path, engine=arguments.engine, threads=threads, eager=arguments.eager,
        spin=not arguments.no_spin, verify=not arguments.no_verify,
        checkpoint=arguments.checkpoint, device=arguments.device, plans=arguments.plans,
        notice=lambda line: print(f"fp-run: {line}", file=sys.stderr),
    )  # fmt: skip
    session = opened.session(options)
    print(
        f"fp-run: engine {opened.engine.name} ({opened.engine_reason}), cache {session.cache} ({session.cache_reason}), "
        f"embedding {session.embedding} ({session.embedding_reason}), overlap {session.overlap} ({session.overlap_reason}), "
        f"guidance {session.options.guidance} ({'the default' if arguments.guidance is None else 'asked for'})"
    )
    if driving.num_frames is not None:
        session.check_length(driving.num_frames)
    session.set_reference(portrait)
    width = config.width * (3 if arguments.side_by_side else 1)
    sound = None if arguments.no_sound else driving.sound
    with VideoWriter(arguments.output, width, config.height, driving.fps, audio_from=sound) as writer:
        render(session, driving, writer, portrait if arguments.side_by_side else None)
    report = figures(session, opened, writer, driving, time.perf_counter() - start)
    print_figures(arguments.output, report, as_json=arguments.json)
    return 0


def render(session, driving, writer, portrait=None) -> None:
    """Drive the session and write every picture as soon as it is there. With `portrait`: reference | driving | output."""
    from collections import deque

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from factorportrait.runtime.media.writer import compose_side_by_side

    timings = session.timings
    shown: deque = deque()  # what drove the frames that are not out yet: at most one chunk, or one clip

    def timed():
        frames = iter(driving)
        while True:
            with timings("input"):
                frame = next(frames, None)
            if frame is None:
                return
            if portrait is not None:
                shown.append(frame.image if frame.image is not None else frame.normals)
            yield frame

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    def write(picture) -> None:
        with timings("write"):
            if portrait is not None:
                picture = compose_side_by_side(portrait, shown.popleft(), picture)
            writer.write(picture)

    overlapped = Behind(write, WRITTEN_BEHIND, "writer") if session.overlap != "none" else contextlib.nullcontext(write)
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty(), console=stderr_console()) as progress:
        task = progress.add_task("rendering", total=driving.num_frames, speed="")
        with overlapped as write_next:
            for picture in session.frames(timed()):
                write_next(picture)
                progress.update(task, advance=1, speed=f"{timings.last_frame_ms:.1f} ms/frame")


def stderr_console():
    from rich.console import Console

    return Console(stderr=True)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that no run can have."""
    for name in ("steps", "frames", "chunk", "window", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}", expected="1 or more", found=str(value), action="choose another number")


def check_unused(arguments: argparse.Namespace, engine: str, mode: str) -> None:
    """Raises UserError for an option that this engine, or this mode, does not look at."""
    usual = parser().get_default
    for name in (*ENGINES_OF, *OF_STREAMS):
        if getattr(arguments, name) == usual(name):
            continue
        option = f"--{name.replace('_', '-')}"
        if engine not in ENGINES_OF.get(name, (engine,)):
            raise UserError(option, expected=f"the engine {' or '.join(ENGINES_OF[name])}", found=engine, action="leave it out")
        if name in OF_STREAMS and mode != "stream":
            raise UserError(option, expected="a stream", found=f"--mode {mode}", action="leave it out")


def demo_bundle() -> Path:
    """The shipped demo's bundle. It is exported, in a process of its own since that needs torch, when it is missing or was made
    from another checkpoint than the one that ships now."""
    path = default_bundle_path(DEMO_NAME, PRECISIONS[0])
    if not demo_bundle_is_current(path):
        print(f"fp-run: no bundle given, and the demo's is not there yet: exporting it to {path}", file=sys.stderr)
        command = [sys.executable, "-m", "factorportrait.export.cli", "--output", str(path)]
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            raise UserError(
                "the demo bundle",
                expected="fp-export to make it",
                found="its error above",
                action="mend that, or name a bundle: fp-run BUNDLE",
            )
    return path


def default_driving(arguments: argparse.Namespace) -> Path | None:
    """The shipped driving clip, unless the expression comes from somewhere else."""
    return None if arguments.expression_from else shipped_inputs() / "driving_clip"


def figures(session, opened, writer, driving, wall_s: float) -> dict:
    """What `--json` prints: frames, rates, milliseconds, memory.

    `frame_ms` is end to end, reading and rendering the driving and writing the video included; `generate_ms` and `generated_fps`
    are the session alone, and null where its stages overlap: they work on several chunks at once.
    """
    timings = session.timings
    return {
        "output": str(writer.path),
        "frames": writer.num_frames,
        "fps": str(driving.fps),
        "mode": session.options.mode,
        "steps": session.options.steps,
        "solver": session.options.solver,
        "shift": session.options.shift,
        "seed": session.options.seed,
        "generated_fps": None if timings.busy_s is None else round(timings.num_frames / timings.busy_s, 3),
        **timings.summary(),
        "load_ms": round(1000 * opened.load_s, 1),
        "wall_ms": round(1000 * wall_s, 1),
        "kv_cache": session.cache,
        "kv_cache_reason": session.cache_reason,
        "kv_cache_bytes": session.cache_bytes,
        "overlap": session.overlap,
        "overlap_reason": session.overlap_reason,
        "embedding": session.embedding,
        "embedding_reason": session.embedding_reason,
        "peak_memory_bytes": peak_memory_bytes(),
        "engine": opened.engine.name,
        "engine_reason": opened.engine_reason,
        "device": opened.engine.device,
        "threads": getattr(opened.engine, "threads", None),
        "precision": opened.bundle.manifest.precision,
    }


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_figures(output: str, report: dict, as_json: bool) -> None:
    memory, generate_ms = report["peak_memory_bytes"], report["generate_ms_p50"]
    print(
        f"fp-run: {output}: {report['frames']} frames, {report['frame_ms_p50']:.1f} ms per frame end to end "
        f"(p95 {report['frame_ms_p95']:.1f})"
        + (f", {generate_ms:.1f} ms of it generating" if generate_ms is not None else "")
        + f"; first frame after {report['time_to_first_frame_ms']:.0f} ms"
        + (f"; peak memory {memory / 2**20:.0f} MiB" if memory else "")
    )
    if as_json:
        print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
