"""Drawn weights of a model shape: `python -m factorportrait.benchmarks.random_checkpoint FOLDER < config.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from factorportrait.export.checkpoint import save_checkpoint
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.model_config import ModelConfig


def main() -> int:
    torch.manual_seed(0)
    model = FactorPortrait(ModelConfig.from_dict(json.load(sys.stdin))).eval().requires_grad_(False)
    save_checkpoint(model, Path(sys.argv[1]), torch.float16)
    return 0


if __name__ == "__main__":
    sys.exit(main())
