"""What can stand in a row of a report. One interface: `Peer` says whether it can run a case here, and opens it as a `Subject`."""

from __future__ import annotations

from factorportrait.benchmarks.peers.base import Peer, Sample, Subject
from factorportrait.benchmarks.peers.diffusers_wan import DIFFUSERS
from factorportrait.benchmarks.peers.loop import LOOPS
from factorportrait.benchmarks.peers.naive import NAIVE

PEERS: dict[str, Peer] = {peer.name: peer for peer in (*LOOPS, NAIVE, DIFFUSERS)}

__all__ = ["PEERS", "Peer", "Sample", "Subject"]
