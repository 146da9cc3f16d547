"""In which order does a rank send, receive and compute?"""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.distributed.blocks import blocks_of, ring
from tilewise.distributed.order import order_of
from tilewise.distributed.walk import Gathered, Keys, Ring
from tilewise.parts.shape import Shape

LENGTH, RANKS, DIM = 24, 3, 4


class Recorder:
    """A channel that sends nothing and says what it was asked for; what arrives is as it lies in memory."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self, sends, receives, step):
        self.log.append(f"start {step}")
        return Waited(self.log, step)


class Waited:
    def __init__(self, log: list[str], step: int) -> None:
        self.log, self.step = log, step

    def wait(self) -> None:
        self.log.append(f"wait {self.step}")


def walk(kind, rank, channel):
    order = order_of(LENGTH, RANKS)
    shape = Shape(1, 1, 1, LENGTH, LENGTH, DIM, DIM)
    blocks = blocks_of((tilewise.Causal(),), shape, order, order)
    k, v = torch.zeros(2, 1, 1, order.rows_each, DIM)
    return kind(channel, ring(rank, blocks.seen, order, order), Keys(order.held[rank], k, v))


def computed(log):
    def compute(keys):
        log.append(f"compute {keys.chunks}")
        return Keys(keys.chunks, torch.zeros_like(keys.k), torch.zeros_like(keys.v))

    return compute


def test_keys_travel_while_those_before_are_computed_with():
    channel = Recorder()
    walk(Ring, 1, channel).forward(computed(channel.log))
    assert channel.log == [
        "start 1", "compute (1, 4)", "wait 1", "start 2", "compute (0,)", "wait 2", "compute (2, 3)"
    ]  # fmt: skip


def test_gradients_travel_while_the_next_ones_are_computed():
    channel = Recorder()
    walk(Ring, 1, channel).backward(computed(channel.log))
    assert channel.log == [
        "start 1", "compute (1, 4)", "wait 1",
        "start 2", "compute (0,)", "start 1", "wait 2",  # the second "start 1" is of gradients
        "compute (2, 3)", "start 2", "wait 1", "wait 2",
    ]  # fmt: skip


@pytest.mark.parametrize("rank", range(RANKS))
def test_gathered_keys_are_computed_with_at_once(rank):
    channel = Recorder()
    walk(Gathered, rank, channel).forward(computed(channel.log))
    seen = tuple(range(2 * RANKS - rank))  # under a causal mask
    assert channel.log == ["start 1", "start 2", "wait 1", "wait 2", f"compute {seen}"]
