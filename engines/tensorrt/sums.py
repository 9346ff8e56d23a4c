"""The kernel that adds up velocities on the GPU, compiled by NVRTC for the GPU that is there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from factorportrait.engines.base import Call, DeviceArray
from factorportrait.engines.tensorrt.cuda import Device
from factorportrait.engines.tensorrt.kernels import Kernels

_log = logging.getLogger(__name__)
THREADS = 256  # of a block


class SumKernel:
    """`weighted_sum` of sum.cu on a device's stream.

    Attributes:
        reason: why it cannot be used here; empty where it can.
    """

    def __init__(self, device: Device):
        self._device, self.reason = device, ""
        try:
            self._kernels = Kernels(device, "sum.cu", ["weighted_sum"])
        except Exception as error:  # NVRTC, its loader and the driver raise types of their own; sums go by way of the host then
            self.reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("steps of a chunk run one by one, their sums on the host: no kernel for them (%s)", self.reason)

    def bind(self, target: DeviceArray, terms: Sequence[tuple[DeviceArray, float]], first: int) -> Call:
        """See `factorportrait.engines.base.Engine.weighted_sum`. Addresses and weights go to tables on the device now."""
        sources, weights = (
            self._upload(np.array(column, dtype))
            for column, dtype in zip(zip(*((source.address, weight) for source, weight in terms), strict=True),
                                     (np.uint64, np.float32), strict=True)
        )  # fmt: skip
        size, period, skipped = prod(target.shape), prod(target.shape[2:]), first * prod(target.shape[3:])
        grid, block, i64 = (-(-size // THREADS), 1, 1), (THREADS, 1, 1), np.int64
        arguments = sources, weights, np.int32(len(terms)), target, i64(size), i64(period), i64(skipped)

        def call(_memory: Any = (sources, weights, target, terms)) -> None:
            self._kernels.launch("weighted_sum", grid, block, *arguments)

        return call

    def _upload(self, values: np.ndarray) -> DeviceArray:
        buffer = self._device.zeros(values.shape, str(values.dtype))
        self._device.copy(values, buffer)
        return buffer
