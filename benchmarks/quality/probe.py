"""An independent reader of pictures: expression and pose of a rendered head, by a small convolutional network.

    python -m factorportrait.benchmarks.quality.probe train --data DIR --out FILE --minutes 20

It sees ground-truth renders of the TRAIN split only (python -m demo.dataset), never a generated picture and nothing of the
model that it judges. FILE is ONNX with fp16 weights; beside it FILE.pt holds the state from which the same command goes on.

picture [B, 3, 128, 128] in -1..1 -> 52 ARKit coefficients and three rotations as their first two columns (Zhou et al. 2019):
head in head space (pose), head space in the camera (camera: how the shoulders are seen), head in the camera.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.command import run_command
from factorportrait.errors import UserError
from factorportrait.files import whole_file
from factorportrait.runtime.media.fit import resize

log = logging.getLogger(__name__)
SIDE = 128
NUM_COEFFICIENTS = len(ARKIT_NAMES)
ROTATIONS = ("head", "camera", "seen")
NUM_OUTPUTS = NUM_COEFFICIENTS + 6 * len(ROTATIONS)
MAX_BYTES = int(1.5 * 2**20)
STAGE_WIDTHS = (24, 48, 80, 112, 128)  # each halves the picture: 128 -> 4 pixels
NECK_WIDTH, HIDDEN_WIDTH = 48, 112
DEFAULT_PATH = Path(__file__).with_name("probe.onnx")
POOL_SHARDS = 6  # in memory at a time; one is exchanged every EXCHANGE_EVERY steps
EXCHANGE_EVERY = 60
SAVE_EVERY_S = 60.0
EMA_DECAY = 0.998


def rotation_from_columns(columns: np.ndarray) -> np.ndarray:
    """[..., 6], the first two columns one after the other, of any length -> orthonormal [..., 3, 3]."""
    first, second = columns[..., :3], columns[..., 3:]
    x = first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-8)
    y = second - (x * second).sum(-1, keepdims=True) * x
    y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-8)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def columns_from_rotation(rotation: np.ndarray) -> np.ndarray:
    """[..., 3, 3] -> [..., 6]."""
    return np.concatenate([rotation[..., 0], rotation[..., 1]], axis=-1)


@dataclass(frozen=True)
class Reading:
    """What the probe sees in T pictures: coefficients [T, 52]; rotations [T, 3, 3]: see `ROTATIONS`."""

    coefficients: np.ndarray
    head: np.ndarray
    camera: np.ndarray
    seen: np.ndarray


class Probe:
    """The trained probe in ONNX Runtime.

    Attributes:
        notes: how it was trained and its errors on validation people, from the file.

    Raises:
        UserError: the file is missing or is no probe.
    """

    def __init__(self, path: Path, threads: int | None = None):
        import onnxruntime

        if not path.is_file():
            raise UserError(
                f"probe {path}", expected="a file", found="none",
                action="make one: python -m factorportrait.benchmarks.quality.probe train --data DIR --out FILE",
            )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.notes = json.loads(self._session.get_modelmeta().custom_metadata_map["probe"])
        except Exception as error:  # ONNX Runtime raises classes of its own, which share no other base
            raise UserError(
                f"probe {path}", expected="a file that this program's probe training wrote",
                found=str(error).splitlines()[0][:120], action="train it again, or name another --probe",
            ) from error  # fmt: skip

    def __call__(self, pictures: np.ndarray) -> Reading:
        """uint8 [T, H, W, 3], square."""
        values = []
        for picture in pictures:
            pixels = resize(picture, SIDE).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
            values.append(self._session.run(None, {"image": np.ascontiguousarray(pixels)})[0][0])
        table = np.stack(values)
        columns = table[:, NUM_COEFFICIENTS:].reshape(len(table), len(ROTATIONS), 6)
        rotations = {name: rotation_from_columns(columns[:, i]) for i, name in enumerate(ROTATIONS)}
        return Reading(table[:, :NUM_COEFFICIENTS], **rotations)


# Training. torch is imported inside, so that reading with a probe needs none.


def build_network():
    """The network in torch: strided stages with a residual block each, a narrow neck that keeps places, two layers."""
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=max(1, width // 16), bias=False), nn.BatchNorm2d(width),
                nn.ReLU(), nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
            )  # fmt: skip
            nn.init.zeros_(self.body[-1].weight)

        def forward(self, x):  # x: [B, C, h, w]
            return x + self.body(x)

    layers: list[nn.Module] = []
    before = 3
    for i, width in enumerate(STAGE_WIDTHS):
        layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [Residual(width), nn.ReLU()] if i else []
        layers += [Residual(width), nn.ReLU()] if i > 1 else []
        before = width
    cells = (SIDE // 2 ** len(STAGE_WIDTHS)) ** 2
    layers += [nn.Conv2d(before, NECK_WIDTH, 1), nn.ReLU(), nn.Flatten(), nn.Linear(NECK_WIDTH * cells, HIDDEN_WIDTH)]
    layers += [nn.ReLU(), nn.Linear(HIDDEN_WIDTH, NUM_OUTPUTS)]
    return nn.Sequential(*layers)


def targets_of(shard: dict[str, np.ndarray]) -> np.ndarray:
    """Arrays of a shard -> [n, T, NUM_OUTPUTS] float32."""
    head = shard["rotation"].astype(np.float64)
    camera = np.swapaxes(shard["c2w"][..., :3, :3], -1, -2)
    columns = [columns_from_rotation(rotation) for rotation in (head, camera, camera @ head)]
    return np.concatenate([shard["coefficients"], *columns], axis=-1).astype(np.float32)


class ShardPool:
    """Frames of a few shards in memory, exchanged one by one in an order drawn from the seed.

    Raises:
        UserError: not shards of the split, or of another size than the network's.
    """

    def __init__(self, folder: Path, split: str, seed: int, max_shards: int = POOL_SHARDS):
        self.paths = sorted(folder.glob("shard-*.npz"))
        try:
            settings = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = {}
        if not self.paths or settings.get("split") != split or settings.get("size") != SIDE:
            raise UserError(
                f"--data {folder}", expected=f"shards of the {split} split at {SIDE} pixels",
                found=f"{len(self.paths)} shards, split {settings.get('split')}, size {settings.get('size')}",
                action=f"python -m demo.dataset --split {split} --size {SIDE} --out DIR --clips N",
            )  # fmt: skip
        self._rng = np.random.default_rng(seed)
        self._queue = self._order()
        self._shards = [self._load(next(self._queue)) for _ in range(min(max_shards, len(self.paths)))]
        self._oldest = 0

    def _order(self) -> Iterator[Path]:
        while True:
            yield from (self.paths[i] for i in self._rng.permutation(len(self.paths)))

    @staticmethod
    def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
        with np.load(path, allow_pickle=False) as archive:
            shard = {name: archive[name] for name in ("frames", "rotation", "c2w", "coefficients")}
        targets = targets_of(shard)
        return shard["frames"].reshape(-1, SIDE, SIDE, 3), targets.reshape(-1, NUM_OUTPUTS)

    def exchange(self) -> None:
        """Put the next shard in the place of the oldest, when there are more than fit."""
        if len(self.paths) > len(self._shards):
            self._shards[self._oldest] = self._load(next(self._queue))
            self._oldest = (self._oldest + 1) % len(self._shards)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [count, SIDE, SIDE, 3] and targets [count, NUM_OUTPUTS], of different moments."""
        places = []
        for _ in range(count):
            frames, targets = self._shards[self._rng.integers(len(self._shards))]
            moment = self._rng.integers(len(frames))
            places.append((frames[moment], targets[moment]))
        return np.stack([frame for frame, _ in places]), np.stack([target for _, target in places])


def augment(images, generator):
    """[B, 3, S, S] in -1..1 -> moved by up to 4 pixels, with other light, some blurred or noisy as generated pictures are."""
    import torch
    import torch.nn.functional as F

    count, side = len(images), images.shape[-1]

    def uniform(*shape: int):
        return torch.rand(shape, generator=generator) * 2 - 1

    dy, dx = (torch.randint(0, 9, (2,), generator=generator)).tolist()
    images = F.pad(images, (4, 4, 4, 4), mode="replicate")[..., dy : dy + side, dx : dx + side]
    images = images * (1 + 0.15 * uniform(count, 1, 1, 1)) + 0.12 * uniform(count, 3, 1, 1)
    third = count // 3
    if third:
        scale = 0.5 + 0.4 * float(torch.rand((), generator=generator))
        small = F.interpolate(images[:third], scale_factor=scale, mode="bilinear", antialias=True)
        soft = F.interpolate(small, size=(side, side), mode="bilinear")
        noise = torch.randn(images[third : 2 * third].shape, generator=generator)
        noisy = images[third : 2 * third] + 0.06 * float(torch.rand((), generator=generator)) * noise
        images = torch.cat([soft, noisy, images[2 * third :]])
    return images.clamp(-1, 1)


def train(options: argparse.Namespace) -> int:
    """Train for `--minutes` more, or until `--steps` in all; then write the ONNX file."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(options.threads)
    state_path = options.out.with_name(options.out.name + ".pt")
    torch.manual_seed(options.seed)
    network, ema = build_network(), build_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=0.02)
    step, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
        print(f"probe: going on at step {step}", flush=True)
    else:
        ema.load_state_dict(network.state_dict())
    pool = ShardPool(options.data, "train", options.seed + step)
    generator = torch.Generator().manual_seed(options.seed + step)
    # Coefficients are rarely far from 0: each counts by its own spread, and rotations by about 0.3 rad.
    spread = torch.from_numpy(pool.draw(512)[1][:, :NUM_COEFFICIENTS].std(0).clip(0.1))
    weight = torch.cat([1 / spread, torch.full((NUM_OUTPUTS - NUM_COEFFICIENTS,), 1 / 0.3)])
    began = saved = time.perf_counter()

    def save() -> None:
        spent = seconds + time.perf_counter() - began
        state = {"network": network.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
        with whole_file(state_path) as temporary:
            torch.save({**state, "step": step, "seconds": spent}, temporary)

    network.train()
    while step < options.steps and (time.perf_counter() - began) < 60 * options.minutes:
        done = max(step / options.steps, (time.perf_counter() - began) / (60 * options.minutes))
        rate = min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.4 + 0.01)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * rate
        pictures, targets = pool.draw(options.batch)
        images = torch.from_numpy(pictures).movedim(-1, 1).float().div(127.5).sub(1)
        found = network(augment(images, generator))
        loss = F.mse_loss(found * weight, torch.from_numpy(targets) * weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, value in zip(ema.state_dict().values(), network.state_dict().values(), strict=True):
                kept.lerp_(value, 1 - decay) if kept.is_floating_point() else kept.copy_(value)
        if step % EXCHANGE_EVERY == 0:
            pool.exchange()
        if step % 50 == 0:
            spent = time.perf_counter() - began
            print(f"probe: step {step}  loss {loss.item():.4f}  {spent:.0f} s", flush=True)
        if time.perf_counter() - saved > SAVE_EVERY_S:
            save()
            saved = time.perf_counter()
    save()
    notes = {"steps": step, "seconds": round(seconds + time.perf_counter() - began), "images": step * options.batch}
    export(ema.eval(), options.out, notes)
    if options.validate:
        notes |= validate(Probe(options.out, options.threads), options.validate)
        export(ema, options.out, notes)
    print(f"probe: {options.out}: {options.out.stat().st_size} bytes, {json.dumps(notes)}", flush=True)
    return 0


def validate(probe: Probe, folder: Path, count: int = 256) -> dict[str, float]:
    """Errors on people that the probe has not seen, and those of always saying the mean."""
    from factorportrait.benchmarks.quality.metrics import angles_deg

    pictures, targets = ShardPool(folder, "val", 0, max_shards=2).draw(count)
    reading = probe(pictures)
    truth = targets[:, :NUM_COEFFICIENTS]
    errors = {
        "val_coefficient_error": np.abs(reading.coefficients - truth).mean(),
        "val_coefficient_error_of_mean": np.abs(truth - truth.mean(0)).mean(),
        "val_explained": 1 - np.square(reading.coefficients - truth).mean() / np.square(truth - truth.mean(0)).mean(),
    }
    for i, name in enumerate(ROTATIONS):
        start = NUM_COEFFICIENTS + 6 * i
        known = rotation_from_columns(targets[:, start : start + 6].astype(np.float64))
        errors[f"val_{name}_error_deg"] = angles_deg(getattr(reading, name), known).mean()
    return {name: round(float(value), 4) for name, value in errors.items()}


def export(network, path: Path, notes: dict) -> None:
    """Fold the norms, and write ONNX whose weights are fp16 and are cast to fp32 when the graph is loaded."""
    import copy

    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    def folded(module):
        children = list(module.named_children())
        for (name, child), (after, norm) in zip(children, children[1:], strict=False):
            if isinstance(child, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, after, torch.nn.Identity())
        for _, child in module.named_children():
            folded(child)
        return module

    nodes: list = []
    weights: list = []

    def constant(tensor, name: str) -> str:
        weights.append(numpy_helper.from_array(tensor.detach().numpy().astype(np.float16), f"{name}_fp16"))
        nodes.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
        return name

    def emit(module, source: str, name: str) -> str:
        """Append the nodes of a module; the name of its output."""
        if isinstance(module, torch.nn.Sequential):
            for key, child in module.named_children():
                source = emit(child, source, f"{name}.{key}")
            return source
        if isinstance(module, torch.nn.Identity):
            return source
        if isinstance(module, torch.nn.Conv2d):
            inputs = [source, constant(module.weight, f"{name}.weight"), constant(module.bias, f"{name}.bias")]
            pads, strides = [*module.padding, *module.padding], list(module.stride)
            nodes.append(helper.make_node("Conv", inputs, [name], pads=pads, strides=strides, group=module.groups))
        elif isinstance(module, torch.nn.Linear):
            inputs = [source, constant(module.weight, f"{name}.weight"), constant(module.bias, f"{name}.bias")]
            nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
        elif isinstance(module, torch.nn.ReLU):
            nodes.append(helper.make_node("Relu", [source], [name]))
        elif isinstance(module, torch.nn.Flatten):
            nodes.append(helper.make_node("Flatten", [source], [name]))
        else:  # a residual block
            nodes.append(helper.make_node("Add", [source, emit(module.body, source, f"{name}.body")], [name]))
        return name

    last = emit(folded(copy.deepcopy(network).eval()), "image", "net")
    nodes.append(helper.make_node("Identity", [last], ["values"]))
    graph = helper.make_graph(
        nodes, "probe",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["B", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["B", NUM_OUTPUTS])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"probe": json.dumps(notes)})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    if len(data) > MAX_BYTES:
        raise RuntimeError(f"the probe has {len(data)} bytes, more than {MAX_BYTES}")
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m factorportrait.benchmarks.quality.probe")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train on ground-truth renders; run again to go on")
    command.add_argument("--data", type=Path, required=True, help="shards of the train split, 128 pixels")
    command.add_argument("--validate", type=Path, help="shards of the val split; errors go into the file")
    command.add_argument("--out", type=Path, default=DEFAULT_PATH, help="default: where fp-bench quality looks for it")
    command.add_argument("--minutes", type=float, default=20.0, help="of this call; the rate falls towards its end")
    command.add_argument("--steps", type=int, default=20000, help="in all")
    command.add_argument("--batch", type=int, default=48)
    command.add_argument("--learning-rate", type=float, default=2e-3)
    command.add_argument("--threads", type=int, default=os.cpu_count())
    command.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return run_command("probe", lambda: train(options))


if __name__ == "__main__":
    sys.exit(main())
