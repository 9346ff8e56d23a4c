"""config.json: there and back, and near misses."""

from __future__ import annotations

import copy
import json

import pytest
from helpers import TINY

from factorportrait.bundle import Manifest
from factorportrait.errors import BundleError, CheckpointError
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
        ({"dit__dim": "64"}, ['config: dit: dim; expected an integer; found "64"; correct config.json']),
        ({"dit__dim": True}, ["dit: dim; expected an integer; found true"]),
        ({"dit__dim": 64.0}, ["dit: dim; expected an integer; found 64.0"]),
        ({"height": "32"}, ['config: height; expected an integer; found "32"']),
        ({"height": 0}, ["config: height; expected a positive integer; found 0"]),
        ({"generation__chunk_frames": "2"}, ['generation: chunk_frames; expected an integer; found "2"']),
        ({"dit__patch_size": 2}, ["dit: patch_size; expected a list of 3 integers; found 2"]),
        ({"dit__patch_size": [1, 2]}, ["expected a list of 3 integers; found [1, 2]"]),
        ({"dit__patch_size": [1, 2, 3]}, ["two equal sizes; found [1, 2, 3]"]),
        ({"dit__patch_size": [1, 0, 0]}, ["a list of positive integers; found [1, 0, 0]"]),
        ({"fusion": {"streams": 5}}, ["fusion: streams; expected a list of strings; found 5"]),
        ({"fusion": {"streams": "noise"}}, ["expected a list of strings"]),
        ({"vae__latents_std": ["a"] * 16}, ["vae: latents_std; expected a list of numbers or null"]),
        ({"vae__latents_std": [0.0] * 16}, ["vae: latents_std; expected a list of positive numbers"]),
        ({"vae__dim_mult": [1, "2", 2]}, ["vae: dim_mult; expected a list of integers"]),
        ({"vae__temporal_downsample": [1, 1]}, ["a list of flags; found [1, 1]"]),
        ({"vae__temporal_downsample": [True, False]}, ["4 frames one latent frame; found 2 frames"]),
        ({"dit__num_heads": 0}, ["dit: num_heads; expected a positive integer; found 0"]),
        ({"dit__num_layers": -1}, ["dit: num_layers; expected a positive integer; found -1"]),
        ({"dit__qk_norm": 1}, ["dit: qk_norm; expected true or false; found 1"]),
        ({"dit__freq_dim": 33}, ["freq_dim; expected an even number"]),
        ({"dit__eps": float("nan")}, ["dit: eps; expected a number; found NaN"]),
        ({"dit__rope_theta": 10**400}, ["dit: rope_theta; expected a number; found 1000"]),
        ({"dit__max_position": 3}, ["max_position; expected more than the 9 frames", "found 3"]),
        ({"camera": {"target": "abc"}}, ['camera: target; expected a list of 3 numbers; found "abc"']),
        ({"camera": {"fov_degrees": 180}}, ["camera: fov_degrees; expected more than 0 and less than 180; found 180"]),
        ({"camera": {"distance": 0}}, ["camera: distance; expected a positive number; found 0"]),
        ({"fps": None}, ["config: fps; expected a number; found null"]),
        ({"fps": "x"}, ['config: fps; expected a number; found "x"']),
        ({"fps": 0}, ["config: fps; expected a positive number"]),
        ({"generation__denoising_steps": 0}, ["generation: denoising_steps; expected a positive integer; found 0"]),
        ({"expression__image_size": 30}, ["image_size; expected a multiple of 16", "found 30"]),
        ({"expression__encoder_widths": []}, ["encoder_widths; expected a list of positive integers; found []"]),
        ({"expression__encoder_blocks": -1}, ["encoder_blocks; expected 0 or more"]),
        ({"name": ["tiny"]}, ["config: name; expected a string"]),
        ({"fusion": {"rays": "first"}}, ["packed or last", "'first'"]),
        ({"fusion": {"reference_slots": "last"}}, ["reference_slots", "first or all", "'last'"]),
        ({"expression__aggregator": "max"}, ["causal_conv, window or mean"]),
        ({"generation__modes": []}, ["clip, stream or both"]),
        ({"generation__chunk_frames": 9}, ["1 <= chunk_frames <= window_frames"]),
        ({"generation__solver": "heun"}, ["euler, flow-match, renoise, unipc or dpm++"]),
        ({"height": 36}, ["multiples of 16", "36 x 32"]),
        ({"system": "dex"}, ["expected factorportrait or wan-fun-control", "'dex'"]),
        ({"dit__out_channels": 8}, ["fusion.latent_channels = dit.out_channels = vae.z_dim"]),
        ({"vae__latents_std": [1.0]}, ["16 numbers"]),
    ],
)
def test_refused(change, words, tiny_config):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(edited(**change))
    assert "\n" not in str(caught.value) and caught.value.action
    for word in words:
        assert word in str(caught.value)
    # The same config in a bundle, where the way out is another.
    whole = Manifest(tiny_config, "fp32", targets=("cpu",), stages={}, files={}, provenance={}, source_key="0")
    data = json.loads(whole.to_json())
    with pytest.raises(BundleError, match="^manifest.json: config.*make the bundle again with fp-export$"):
        Manifest.from_json(json.dumps(data | {"config": edited(**change)}), "manifest.json")


def test_integers_are_numbers_too(tiny_config):
    config = ModelConfig.from_dict(edited(fps=24, camera={"target": [0, 0, 1]}))
    assert config.fps == 24.0 and isinstance(config.fps, float)
    assert config.camera.target == (0.0, 0.0, 1.0)
    assert ModelConfig.from_dict(edited(dit__text_dim=None)) == tiny_config


def test_missing_part():
    data = edited()
    del data["vae"], data["fps"]
    with pytest.raises(CheckpointError, match="missing fps, vae"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_not_an_object(data):
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        ModelConfig.from_dict(data)
