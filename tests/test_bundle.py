"""Opening a bundle, and every way in which one can be damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from factorportrait.bundle import SCHEMA, SCHEMA_1_TARGETS, Bundle, Manifest
from factorportrait.errors import BundleError


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def edit(folder, change):
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def refused(folder, *, verify: bool = False) -> str:
    with pytest.raises(BundleError) as caught:
        bundle = Bundle(folder)
        if verify:
            bundle.verify()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opens(tiny_bundle, tiny_config, tiny_model):
    bundle = Bundle(tiny_bundle)
    assert bundle.config == tiny_config
    assert bundle.manifest.precision == "fp32"
    assert Manifest.from_json(bundle.manifest.to_json(), "text") == bundle.manifest
    neutral = bundle.constants()["neutral_code"]
    assert np.array_equal(neutral, tiny_model.expression["controller"].neutral_code.numpy())
    assert {path.name for path in tiny_bundle.iterdir()} == {*bundle.manifest.files, "manifest.json"}
    bundle.verify()


def test_no_folder(tmp_path):
    assert "found nothing" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "found a file" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "expected a manifest.json" in refused(tmp_path / "empty")


def test_missing_file(copy):
    (copy / "dit.onnx").unlink()
    message = refused(copy)
    assert "dit.onnx" in message and "no such file" in message and "fp-export" in message


def test_truncated_file(copy):
    content = (copy / "dit.onnx").read_bytes()
    (copy / "dit.onnx").write_bytes(content[:-1])
    assert f"expected {len(content)} bytes; found {len(content) - 1}" in refused(copy)


def test_one_flipped_bit(copy):
    content = bytearray((copy / "dit.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "dit.onnx").write_bytes(content)
    Bundle(copy)
    assert "expected sha256" in refused(copy, verify=True)


def test_newer_schema(copy):
    edit(copy, lambda data: data.update(schema=SCHEMA + 1, stages="something else"))
    assert f"expected schema {SCHEMA} or older; found schema {SCHEMA + 1}; update factorportrait" in refused(copy)


def add_variant(folder):
    """A graph of time_embed for TensorRT alone, which has its weights in a file that another stage uses too."""
    shutil.copy(folder / "time_embed.onnx", folder / "time_embed.tensorrt.onnx")
    (folder / "shared.data").write_bytes(bytes(1000))

    def change(data):
        own = {**data["stages"]["time_embed"], "file": "time_embed.tensorrt.onnx", "data": ["shared.data"]}
        data["stages"]["arkit_encoder"]["data"] = ["shared.data"]
        data["files"]["time_embed.tensorrt.onnx"] = data["files"]["time_embed.onnx"]
        data["files"]["shared.data"] = {"sha256": "0" * 64, "bytes": 1000}
        data.update(targets=["cpu", "tensorrt"], variants={"tensorrt": {"time_embed": own}})

    edit(folder, change)


def test_a_variant_is_what_its_target_gets(copy):
    add_variant(copy)
    bundle = Bundle(copy)
    assert bundle.stage("time_embed").file == bundle.stage("time_embed", "cpu").file == "time_embed.onnx"
    assert bundle.stage("time_embed", "tensorrt").files == ("time_embed.tensorrt.onnx", "shared.data")
    assert bundle.stage("dit", "tensorrt") == bundle.stage("dit")
    assert Manifest.from_json(bundle.manifest.to_json(), "text") == bundle.manifest
    # Weights that two graphs share count once (shared.data is of arkit_encoder too).
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    graphs = {file for spec in bundle.manifest.stages.values() for file in spec.files}
    assert bundle.manifest.target_bytes("cpu") == sum(sizes[name] for name in graphs)
    assert bundle.manifest.target_bytes("tensorrt") == bundle.manifest.target_bytes("cpu")
    with pytest.raises(BundleError, match="expected graphs for cuda; found graphs for cpu, tensorrt; .*--target cuda"):
        bundle.stage("time_embed", "cuda")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: data.update(targets=[]), "targets; expected some of cpu, cuda, tensorrt; found none"),
        (lambda data: data.update(targets=["cpu", "abacus"]), "found cpu, abacus"),
        (lambda data: data.update(targets="cpu"), "targets; expected"),
        (lambda data: data["variants"].update(cuda={}), "variants; expected targets of this bundle"),
        (lambda data: data["variants"]["tensorrt"]["time_embed"].update(file="none.onnx"), "found none.onnx"),
        (lambda data: data["variants"]["tensorrt"]["time_embed"].update(data=["none.data"]), "found none.data"),
        (lambda data: data["variants"]["tensorrt"]["time_embed"].update(data="shared.data"), "data; expected"),
        (lambda data: data["stages"]["dit"].pop("data"), "'data'"),
        (lambda data: data.pop("targets"), "'targets'"),
        (lambda data: data.pop("variants"), "'variants'"),
    ],
)
def test_damaged_variants(copy, change, words):
    add_variant(copy)
    edit(copy, change)
    assert words in refused(copy)


def test_reads_schema_1(copy):
    """No targets, no variants; weights beside a graph had its name."""
    (copy / "dit.onnx.data").write_bytes(b"weights")
    plain = json.loads((copy / "manifest.json").read_text())

    def change(data):
        data["schema"] = 1
        del data["targets"], data["variants"]
        for entry in data["stages"].values():
            del entry["data"]
        data["files"]["dit.onnx.data"] = {"sha256": "0" * 64, "bytes": 7}

    edit(copy, change)
    bundle = Bundle(copy)
    assert bundle.manifest.targets == SCHEMA_1_TARGETS and not bundle.manifest.variants
    assert bundle.stage("dit", "cuda").data == ("dit.onnx.data",)
    assert bundle.stage("time_embed").data == tuple(plain["stages"]["time_embed"]["data"])
    with pytest.raises(BundleError, match="expected graphs for tensorrt"):
        bundle.stage("dit", "tensorrt")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_path_out_of_the_bundle(copy, name):
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit(copy, lambda data: data["files"].update({name: entry}))
    assert "a path inside the bundle" in refused(copy)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "not_listed.onnx"])
def test_graph_that_is_not_listed(copy, name):
    edit(copy, lambda data: data["stages"]["dit"].update(file=name))
    with pytest.raises(BundleError):
        bundle = Bundle(copy)
        bundle.file(bundle.stage("dit").file)


@pytest.mark.parametrize("key", ["stages", "files", "config", "precision", "provenance", "source_key", "schema"])
def test_missing_key(copy, key):
    edit(copy, lambda data: data.pop(key))
    assert "manifest.json" in refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(precision=32),
        lambda data: data.update(source_key=None),
        lambda data: data.update(provenance=[]),
        lambda data: data["provenance"].update(versions=["torch"]),
        lambda data: data.update(schema=True),
        lambda data: data["stages"]["dit"].update(file=5),
        lambda data: data["stages"]["dit"].update(check=[]),
        lambda data: data["stages"]["dit"].update(check={"max_relative": "small"}),
        lambda data: data["stages"]["dit"]["inputs"][0].update(shape="1, 16"),
        lambda data: data["stages"]["dit"]["inputs"][0].update(dtype=None),
        lambda data: data["files"]["dit.onnx"].update(bytes="1"),
    ],
)
def test_value_of_another_type(copy, change):
    edit(copy, change)
    assert refused(copy).endswith("make the bundle again with fp-export")


@pytest.mark.parametrize("content", [b"", b"PK", b"text", "npy", "cut", "flipped", {}, {"other": 3}, {"neutral_code": 3}])
def test_damaged_constants(copy, content):
    file = copy / "constants.npz"
    whole = file.read_bytes()
    if isinstance(content, dict):
        np.savez(file, **{name: np.zeros(size, np.float32) for name, size in content.items()})
    elif content == "npy":
        with open(file, "wb") as opened:
            np.save(opened, np.zeros(3))
    elif content == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        at = whole.index(b"NUMPY") + 100
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    else:
        file.write_bytes(content)
    edit(copy, lambda data: data["files"]["constants.npz"].update(bytes=file.stat().st_size))
    with pytest.raises(BundleError, match="constants.npz; expected .*; found .*; make the bundle again"):
        Bundle(copy).constants()


def test_input_that_a_graph_lacks(tiny_bundle):
    spec = Bundle(tiny_bundle).stage("dit")
    assert spec.input("noise_latents").dtype == "float32"
    with pytest.raises(BundleError, match="stage dit; expected an input noise; found noise_latents, .*fp-export"):
        spec.input("noise")


@pytest.mark.parametrize("text", ["[" * 100000, "", "{", "[]", "3", "null", "not json", '{"schema": "1"}'])
def test_no_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "manifest.json" in refused(copy)


def test_unknown_config_key(copy):
    edit(copy, lambda data: data["config"]["dit"].update(num_layer=2))
    assert "did you mean 'num_layers'" in refused(copy)


def test_unknown_stage(tiny_bundle):
    with pytest.raises(BundleError, match="expected a stage text_embed"):
        Bundle(tiny_bundle).stage("text_embed")
