"""The plan of a large export: figures that follow from the sizes, and refusals before anything starts."""

from __future__ import annotations

import pytest
import torch
from wan_models import lazy

from factorportrait.errors import UserError
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.weights import estimate
from factorportrait.export.weights.estimate import ExportPlan, check_room, plan_export
from factorportrait.export.weights.networks import PUBLISHED

GIB = 2**30


@pytest.fixture(scope="module")
def weights():
    network = PUBLISHED["Wan2.1-T2V-14B"]
    with torch.device("meta"):
        return lazy(WanDiT(network.dit, network.fusion, 4, 4).state_dict())


def test_14b_in_fp16_block_by_block(weights):
    plan = plan_export(weights, weight_bytes=2)
    assert plan.part_blocks == (1,) * 40
    # All weights once, in fp16, and the graphs.
    assert plan.disk_bytes == int(14_288_491_584 * 2 * 1.02)
    # A block has 351 million weights: float32 beside two halves, not 14 billion of anything.
    block = sum(tensor.nbytes // 4 for name, tensor in weights.items() if name.startswith("blocks.7."))
    assert plan.memory_bytes == block * 8 + estimate.EXPORTER_BYTES and plan.memory_bytes < 4 * GIB
    assert 300 < plan.seconds < 3600


def test_larger_parts_take_more_memory_and_no_more_disk(weights):
    plans = [plan_export(weights, 2, parts) for parts in (1, 8, 1000)]
    assert [len(plan.part_blocks) for plan in plans] == [40, 5, 1]
    assert plans[0].memory_bytes < plans[1].memory_bytes < plans[2].memory_bytes
    assert len({plan.disk_bytes for plan in plans}) == 1
    assert str(plans[1]).startswith("5 parts of up to 8 blocks: 27.1 GiB on disk")


def test_networks_beside_the_transformer_count(weights):
    alone, beside = plan_export(weights, 2), plan_export(weights, 2, beside_bytes=GIB)
    # In memory in fp32 all the time, in the bundle in fp16. Where they are the largest, their graphs are what needs most.
    assert beside.memory_bytes == alone.memory_bytes + GIB
    assert beside.disk_bytes == pytest.approx(alone.disk_bytes + 0.5 * GIB * 1.02, abs=2)
    assert plan_export(weights, 2, beside_bytes=8 * GIB).memory_bytes == 16 * GIB + estimate.EXPORTER_BYTES


def test_last_part_holds_the_rest(weights):
    assert plan_export(weights, 2, 12).part_blocks == (12, 12, 12, 4)


def test_no_room_is_told_before_the_start(tmp_path, monkeypatch):
    plan = ExportPlan((2, 2), disk_bytes=10 * GIB, memory_bytes=4 * GIB, seconds=60.0)
    output = tmp_path / "not" / "there" / "yet"
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 9 * GIB}))
    with pytest.raises(UserError, match="expected 10.0 GiB of free disk; found 9.0 GiB"):
        check_room(plan, output, 8 * GIB)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 11 * GIB}))
    check_room(plan, output, 8 * GIB)
    with pytest.raises(UserError, match="expected 4.0 GiB of free memory; found 3.0 GiB; export fewer blocks at a time"):
        check_room(plan, output, 3 * GIB)
    assert not output.parent.exists()


def test_what_is_no_transformer():
    with pytest.raises(ValueError, match="found no blocks"):
        plan_export({}, 2)
    with pytest.raises(ValueError, match="positive"):
        plan_export({}, 2, 0)
