"""The phases in the order in which they run; each takes what the earlier ones left in the work folder.

`run_...` returns whether the phase is finished; it is not when the deadline came first.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo.presets import MODEL, PhaseSettings, Preset
from demo.train import dit as dit_phase
from demo.train import expression as expression_phase
from demo.train import latents as latents_phase
from demo.train import vae as vae_phase
from demo.train.data import ClipStore, Source, check_clips
from demo.train.evaluate import evaluate
from demo.train.trainer import Draw, Metrics, Trainer, save_atomically
from factorportrait.arkit import ARKIT_NAMES
from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.checkpoint import load_checkpoint, save_checkpoint
from factorportrait.export.models.expression import ArkitEncoder, ExpressionEncoder
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.files import whole_file
from factorportrait.model_config import ModelConfig

log = logging.getLogger(__name__)
REFRESH_STEPS = 50  # between two looks for new shards
INITIAL_CODE_SIZE = 0.1  # of the encoder's output, of unit variance later
LATENT_SPLITS = ("val", "train")


@dataclass
class Job:
    """What the command line asks for."""

    preset: Preset
    data: Path
    work: Path
    out: Path
    minutes: float | None = None
    device_name: str | None = None
    clips: int = 32
    deadline: float = math.inf  # of time.monotonic

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    @cached_property
    def device(self) -> torch.device:
        """Raises: UserError: there is no such device."""
        name = self.device_name or self.preset.device
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", name):
            raise UserError("--device", expected="cpu, cuda, or cuda:0 and so on", found=repr(name), action="name one of these")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
            raise UserError(
                f"device {name}", expected="an NVIDIA GPU that torch can use", found=f"{count} of them",
                action="use --preset cpu, or name another --device",
            )  # fmt: skip
        return torch.device(name)

    def store(self, split: str) -> ClipStore:
        """Raises: UserError: the clips are of another split or size."""
        check_clips(self.data / split, split, MODEL)
        return ClipStore(self.data / split, self.work / "unpacked" / split)

    def latents(self, split: str) -> latents_phase.LatentStore:
        """Raises: UserError: there are none, or those of other clips."""
        check_clips(self.data / split, split, MODEL)
        folder = self.work / "latents" / split
        latents_phase.check_encoded(folder, self.data / split)
        return latents_phase.LatentStore(folder)

    def settings(self, settings: PhaseSettings) -> PhaseSettings:
        return settings if self.minutes is None else replace(settings, minutes=self.minutes)


def refresher(store: ClipStore | latents_phase.LatentStore):
    """Looks for new shards every `REFRESH_STEPS` steps."""

    def refresh(step: int) -> None:
        if step % REFRESH_STEPS == 0:
            store.refresh()

    return refresh


def vae_trainer(job: Job, vae: PatchVAE) -> Trainer:
    settings, preset = job.settings(job.preset.vae), job.preset
    vae_phase.train_only_decoder(vae)
    return Trainer("vae", vae, settings, job.work, preset.seed, vae_phase.is_matrix, preset.workers, job.deadline)


def expression_trainer(job: Job, nets: nn.ModuleDict) -> Trainer:
    settings, preset = job.settings(job.preset.expression), job.preset
    is_matrix = expression_phase.is_matrix
    return Trainer("expression", nets, settings, job.work, preset.seed, is_matrix, preset.workers, job.deadline)


def dit_trainer(job: Job, model: FactorPortrait) -> Trainer:
    settings, preset = job.settings(job.preset.dit), job.preset
    dit_phase.train_only_transformer(model)

    def rate_of(name: str) -> float:
        return settings.controller_rate if name.startswith("expression.") else 1.0

    return Trainer("dit", model, settings, job.work, preset.seed, dit_phase.is_matrix, preset.workers, job.deadline, rate_of)


def run_vae(job: Job) -> bool:
    train, val = job.store("train"), job.store("val")
    torch.manual_seed(job.preset.seed)
    vae = PatchVAE(MODEL.vae)
    if not (job.work / "vae.pt").exists():
        vae_phase.fit_components(vae, train, job.preset.seed)
    trainer = vae_trainer(job, vae.to(job.device))
    settings = trainer.settings
    trainer.resume()
    trainer.save()  # the latents, and with them the transformer, need no more than this

    def part_loss(vae, draw, part):
        return vae_phase.vae_loss(vae, draw, *vae_phase.sample_crops(train, draw, settings.batch, job.device))

    return trainer.run(part_loss, partial(vae_phase.validate, store=val, device=job.device), refresher(train))


def averaged(job: Job, phase: str) -> dict[str, torch.Tensor]:
    """The averaged weights that a phase has reached."""
    path = job.work / f"{phase}.pt"
    if not path.exists():
        raise UserError(f"no {path}", expected="a trained phase", action=f"run python -m demo.train {phase} first")
    return torch.load(path, map_location=job.device, weights_only=True)["ema"]


def expression_nets() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": ExpressionEncoder(MODEL.expression), "arkit": ArkitEncoder(MODEL.expression)})


def code_basis(job: Job) -> expression_phase.CodeBasis:
    """Between coefficients and codes; measured once and kept, because everything later depends on it."""
    path = job.work / "code_basis.pt"
    if not path.exists():
        basis = expression_phase.CodeBasis.from_clips(job.store("train"), MODEL.expression.code_dim, job.preset.seed)
        save_atomically(vars(basis), path)
    return expression_phase.CodeBasis(**torch.load(path, map_location=job.device, weights_only=True))


def run_expression(job: Job) -> bool:
    train, val = job.store("train"), job.store("val")
    torch.manual_seed(job.preset.seed)
    basis = code_basis(job)
    nets = expression_nets().to(job.device)
    images, _ = expression_phase.sample_images(train, Draw(job.preset.seed, "initial", 0, 0), 32, job.device)
    expression_phase.scale_layers(nets["encoder"], images)
    nets["encoder"].code.weight.data *= INITIAL_CODE_SIZE
    trainer = expression_trainer(job, nets)
    settings = trainer.settings
    trainer.resume()

    def part_loss(nets, draw, part):
        images, coefficients = expression_phase.sample_images(train, draw, settings.batch, job.device)
        return expression_phase.expression_loss(nets, draw, images, coefficients, basis)

    return trainer.run(
        part_loss,
        partial(expression_phase.validate, store=val, basis=basis, device=job.device),
        refresher(train),
    )


def config_with_statistics(job: Job) -> ModelConfig:
    """The model's config with the latents' mean and deviation, measured once."""
    path = job.work / "latent_stats.json"
    if not path.exists():
        vae = PatchVAE(MODEL.vae).to(job.device).eval()
        vae.load_state_dict(averaged(job, "vae"))
        save_statistics(latents_phase.latent_statistics(vae, job.store("train"), job.device), path)
    statistics = json.loads(path.read_text())
    vae = replace(MODEL.vae, latents_mean=tuple(statistics["mean"]), latents_std=tuple(statistics["std"]))
    return replace(MODEL, vae=vae)


def save_statistics(statistics: dict[str, list[float]], path: Path) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(statistics) + "\n")


def assemble(job: Job) -> FactorPortrait:
    """The whole model from the phases so far; the transformer is untrained when `dit` has not run."""
    torch.manual_seed(job.preset.seed)
    model = FactorPortrait(config_with_statistics(job)).to(job.device)
    neutral = code_basis(job).code(torch.zeros(len(ARKIT_NAMES), device=job.device))
    model.expression["controller"].neutral_code.copy_(neutral)
    if (job.work / "dit.pt").exists():
        model.load_state_dict(averaged(job, "dit"))  # holds the other networks as they were then
    model.vae.load_state_dict(averaged(job, "vae"))
    model.expression.load_state_dict(averaged(job, "expression"), strict=False)
    return model


def run_init(job: Job, checkpoint: Path) -> None:
    """States of all phases from the weights of a checkpoint folder, at step 0, so that training goes on from there.

    Optimisers and averages start anew. No data are needed; the code keeps its meaning.

    Raises:
        CheckpointError: the checkpoint is of another size than the presets', or of another seed.
        UserError: the work folder has states already.
    """
    names = ("vae.pt", "expression.pt", "dit.pt", "latent_stats.json", "latents", "code_basis.pt")
    existing = [name for name in names if (job.work / name).exists()]
    if existing:
        raise UserError(
            f"{job.work}", expected="no states in it", found=", ".join(existing), action="choose another --work"
        )
    model = load_checkpoint(checkpoint).to(job.device).requires_grad_(True)
    vae = replace(model.config.vae, latents_mean=MODEL.vae.latents_mean, latents_std=MODEL.vae.latents_std)
    if replace(model.config, vae=vae) != MODEL:
        raise CheckpointError(
            f"{checkpoint}", expected="the model of demo/presets.py", found="another config", action="train from the start"
        )
    nets = model.expression
    basis = expression_phase.CodeBasis.from_weights(nets["arkit"], nets["controller"].neutral_code, job.preset.seed)
    vae_trainer(job, model.vae).save()
    expression_trainer(job, nn.ModuleDict({name: nets[name] for name in ("encoder", "arkit")})).save()
    dit_trainer(job, model).save()
    save_statistics({"mean": model.config.vae.latents_mean, "std": model.config.vae.latents_std}, job.work / "latent_stats.json")
    save_atomically(vars(basis), job.work / "code_basis.pt")
    log.info("%s: states of the weights of %s", job.work, checkpoint)


def run_latents(job: Job) -> bool:
    """Encode the shards that are there; run it again when there are more."""
    config = config_with_statistics(job)
    vae = PatchVAE(config.vae).to(job.device).eval()
    vae.load_state_dict(averaged(job, "vae"))

    def encode(split: str, source: Source, name: str, shard: dict[str, np.ndarray]) -> bool:
        versions = {name: lambda: shard}
        if split == "train":
            versions[name + latents_phase.MIRRORED] = lambda: latents_phase.mirrored(shard)
        for version, arrays in versions.items():
            path = job.work / "latents" / split / f"{version}.npz"
            if latents_phase.is_encoded(path, source):
                continue
            if job.out_of_time:
                return False
            latents_phase.write_encoded(path, latents_phase.encode_shard(vae, arrays(), config, job.device), source)
            log.info("latents of %s/%s", split, version)
        return True

    if job.preset.workers > 1:
        torch.set_num_threads(1)
    finished = True
    with ThreadPoolExecutor(job.preset.workers) as pool:
        for split in LATENT_SPLITS:
            (job.work / "latents" / split).mkdir(parents=True, exist_ok=True)
            store = job.store(split)
            encoded = pool.map(lambda item, split=split, store=store: encode(split, store.sources[item[0]], *item), store.shards)
            finished = all(list(encoded)) and finished
    return finished


def run_dit(job: Job) -> bool:
    train, val = job.latents("train"), job.latents("val")
    basis = code_basis(job)
    model = assemble(job)
    dit_phase.prepare(model, basis.code(train.stack("coefficients", list(range(min(64, len(train)))), job.device)))
    trainer = dit_trainer(job, model)
    settings = trainer.settings
    trainer.resume()

    def part_loss(model, draw, part):
        return dit_phase.dit_loss(model, draw, train, basis, settings, job.device)

    def validate(model: FactorPortrait) -> Metrics:
        save_checkpoint(model, job.out, torch.float16)
        return {**dit_phase.validate(model, val, basis, job.device), "clips": len(train)}

    return trainer.run(part_loss, validate, refresher(train))


def run_export(job: Job) -> bool:
    """Write the checkpoint folder: fp16 weights, and the demo's head mesh beside them."""
    save_checkpoint(assemble(job), job.out, torch.float16)
    head = Path(__file__).parents[1] / "inputs" / "head.npz"
    if head.exists():
        shutil.copy(head, job.out / "head.npz")
    size = sum(file.stat().st_size for file in job.out.glob("*.safetensors"))
    print(f"{job.out}: {size / 2**20:.1f} MiB of weights", flush=True)
    return True


def run_evaluate(job: Job) -> bool:
    """Figures and a contact sheet of test identities into the work folder."""
    evaluate(assemble(job).eval(), job.store("test"), job.work, job.device, job.clips, job.preset.workers)
    return True
