"""What every kind of method costs a process past one machine, as formulas; ``docs/scale.md`` is made of them.

``scale.py`` holds them against what small models take. Bytes of one process, of n numbers on d devices or in k
branches; parameters, gradients and moments are float32.
"""

from dataclasses import dataclass

from _costs import FLOAT, all_gather, all_reduce, mean

SIZES = {"1 B": 10**9, "8 B": 8 * 10**9, "70 B": 70 * 10**9, "671 B": 671 * 10**9}
DEVICES = (8, 64, 512, 4096)
MOMENTS = 2
"""Of an optimizer like AdamW, in float32 as the parameters and gradients."""
TRAINING = FLOAT * (2 + MOMENTS)
"""Bytes of a number that trains: it, its gradient and its moments."""


@dataclass(frozen=True)
class Machine:
    """Bytes, and bytes per second, of a device and its share of what it is in; round numbers, to be replaced by yours.

    Attributes:
        memory: Of the device; ``usable`` of it, the rest is for activations.
        host: Host memory a device.
        device_rate: Of its own memory.
        bus: Between it and the host.
        link: To another device.
        disk: Of its share of the file system.
        flops: Operations per second in training, reached.
    """

    memory: float = 80e9
    usable: float = 0.75
    host: float = 256e9
    device_rate: float = 3e12
    bus: float = 50e9
    link: float = 50e9
    disk: float = 1e9
    flops: float = 4e14


@dataclass(frozen=True)
class Cost:
    """Bytes of one process: what it holds beside training, and what one event moves.

    Attributes:
        device: Held on the device.
        host: Held in host memory.
        moved: Read and written in the memory of the device.
        crossed: Between device and host.
        sent: To other processes.
        file: Read and written.
        flops: Operations.
    """

    device: float = 0.0
    host: float = 0.0
    moved: float = 0.0
    crossed: float = 0.0
    sent: float = 0.0
    file: float = 0.0
    flops: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """One after the other, nothing overlapped."""
        return (
            self.moved / machine.device_rate
            + self.crossed / machine.bus
            + self.sent / machine.link
            + self.file / machine.disk
            + self.flops / machine.flops
        )


# ---- averages: sharded as the weights, n numbers over d devices


def average(n: float, d: int) -> Cost:
    """An update reads weights, looks for a NaN in them, reads the average and writes it."""
    return Cost(device=FLOAT * n / d, moved=4 * FLOAT * n / d)


def swap(n: float, d: int) -> Cost:
    """Merged parts in place of raw ones, which are set aside, and back: three copies."""
    return Cost(device=FLOAT * n / d, moved=6 * FLOAT * n / d)


def window(n: float, d: int, k: int = 5) -> Cost:
    """``k`` snapshots and their mean; an update is a copy."""
    return Cost(device=(k + 1) * FLOAT * n / d, moved=2 * FLOAT * n / d)


def recalibration(n: float, d: int, batches: int = 100, tokens: int = 4096) -> Cost:
    """Forward passes of as many batches a device, whose layers are gathered for each."""
    return Cost(sent=batches * all_gather(FLOAT * n / d, d), flops=batches * 2 * n * tokens)


# ---- branches: each device holds its branch whole


def in_turn(n: float, k: int) -> Cost:
    """Others' weights and moments, and the weights that branches last met at; a mean reads and writes each branch."""
    return Cost(device=(k - 1) * FLOAT * (1 + MOMENTS) * n + FLOAT * n, moved=2 * k * FLOAT * n)


def per_process(n: float, k: int) -> Cost:
    """The weights that branches last met at, and the flat tensor of an all-reduce."""
    return Cost(device=2 * FLOAT * n, moved=4 * FLOAT * n, sent=all_reduce(FLOAT * n, k))


def diloco(n: float, k: int) -> Cost:
    """The same, the anchor and the velocity on the host, which cross to the device and back, and new weights."""
    plain = per_process(n, k)
    return Cost(3 * FLOAT * n, 2 * FLOAT * n, 10 * FLOAT * n, 4 * FLOAT * n, plain.sent)


def streaming(n: float, k: int, fragments: int = 8, bits: int = 8) -> Cost:
    """A fragment at a time; what it takes on the device was counted. The anchor crosses twice, to round and to step."""
    part = n / fragments
    held = (3.25 if bits == 32 else 4.5) * FLOAT * part
    return Cost(held, 2 * FLOAT * n, 10 * FLOAT * part, 5 * FLOAT * part, mean([int(part)], bits, k))


# ---- files


def save_parts(n: float, d: int) -> Cost:
    """Each process writes its part of weights, moments and average."""
    return Cost(file=(2 + MOMENTS) * FLOAT * n / d)


def save_branches(n: float, k: int) -> Cost:
    """The first process collects weights and moments of all branches, as bytes and then as tensors, and writes them."""
    own = (1 + MOMENTS) * FLOAT * n
    return Cost(host=2 * k * own, sent=own, file=k * own)


def merge_folders(n: float, p: int, folders: int = 8) -> Cost:
    """``average`` of sharded folders of weights by p processes: all are read, one is written."""
    return Cost(file=(folders + 1) * FLOAT * n / p)
