"""Opening a bundle, and every way in which one can be damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from factorportrait.bundle import SCHEMA, Bundle, Manifest
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


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "not json", '{"schema": "1"}'])
def test_no_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "manifest.json" in refused(copy)


def test_unknown_config_key(copy):
    edit(copy, lambda data: data["config"]["dit"].update(num_layer=2))
    assert "did you mean 'num_layers'" in refused(copy)


def test_unknown_stage(tiny_bundle):
    with pytest.raises(BundleError, match="expected a stage text_embed"):
        Bundle(tiny_bundle).stage("text_embed")
