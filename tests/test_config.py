"""config.json: there and back, and near misses."""

from __future__ import annotations

import copy
import json

import pytest
from helpers import TINY

from factorportrait.errors import CheckpointError
from factorportrait.model_config import ModelConfig


def edited(**changes):
    data = copy.deepcopy(TINY)
    for place, value in changes.items():
        *parts, key = place.split("__")
        target = data
        for part in parts:
            target = target[part]
        target[key] = value
    return data


def test_there_and_back(tiny_config):
    data = json.loads(json.dumps(tiny_config.to_dict()))
    assert ModelConfig.from_dict(data) == tiny_config
    assert hash(ModelConfig.from_dict(data)) == hash(tiny_config)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hight": 32}, ["unknown key 'hight'", "did you mean 'height'"]),
        ({"dit__layers": 2}, ["config: dit: unknown key 'layers'", "did you mean 'num_layers'"]),
        ({"vae__temperal_downsample": [True, True]}, ["unknown key 'temperal_downsample'", "did you mean 'temporal_downsample'"]),
        ({"generation__chunk_frame": 2}, ["did you mean 'chunk_frames'"]),
        ({"camera": {"fov": 20}}, ["config: camera: unknown key 'fov'"]),
        ({"dit__num_heads": 3}, ["even multiple of num_heads", "dim 64, num_heads 3"]),
        ({"dit__patch_size": [2, 2, 2]}, ["expected 1 in time"]),
        ({"dit": []}, ["config: dit", "expected a JSON object", "found list"]),
        ({"fusion": {"streams": ["noise", "pose"]}}, ["each of reference, noise, camera, pose once"]),
        ({"fusion": {"rays": "first"}}, ["packed or last", "'first'"]),
        ({"expression__aggregator": "max"}, ["causal_conv, window or mean"]),
        ({"generation__modes": []}, ["clip, stream or both"]),
        ({"generation__chunk_frames": 9}, ["1 <= chunk_frames <= window_frames"]),
        ({"generation__solver": "heun"}, ["euler or renoise"]),
        ({"height": 36}, ["multiples of 16", "36 x 32"]),
        ({"system": "dex"}, ["expected factorportrait", "'dex'"]),
        ({"dit__out_channels": 8}, ["fusion.latent_channels = dit.out_channels = vae.z_dim"]),
        ({"vae__latents_std": [1.0]}, ["16 numbers"]),
    ],
)
def test_refused(change, words):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(edited(**change))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_part():
    data = edited()
    del data["vae"], data["fps"]
    with pytest.raises(CheckpointError, match="missing fps, vae"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_not_an_object(data):
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        ModelConfig.from_dict(data)
