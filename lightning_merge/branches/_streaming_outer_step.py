"""Fragments of the branches go on, in turn, from a step of an outer optimizer that arrives later."""

from dataclasses import dataclass
from typing import final

import torch

from lightning_merge import weights
from lightning_merge._checks import LISTED, number, settle, whole
from lightning_merge.branches._base import Branches
from lightning_merge.branches._fragments import divided
from lightning_merge.branches._outer_step import OuterStep, stepped
from lightning_merge.branches._policy import Policy
from lightning_merge.branches._quantised import Bits, checked_bits
from lightning_merge.weights import State, Weights


@final
@dataclass(frozen=True)
class StreamingOuterStep(Policy):
    """An outer Nesterov step of one fragment of the layers at each merge, whose result arrives while branches train on.

    At its merge a fragment sends ``g = mean over j of Q(anchor - w_j)``. ``delay`` groups later, ``v <- momentum * v +
    g``, ``anchor <- anchor - lr * (g + momentum * v)``, and every branch goes on from ``w_j <- (1 - mix) * w_j + mix *
    anchor``: what it learned during the delay stays in part. ``Q`` rounds blocks of 256 numbers to ``bits``: whole
    multiples of ``max |block| / (2^(bits - 1) - 1)``; the mean is rounded once more on its way back. Sums and all that
    is kept are float32 (wider if the weights are). Buffers become their mean when their layer is sent, at once and in
    full precision; integers are never rounded.

    With one fragment, no delay, ``mix=1`` and 32 bits it is ``OuterStep``.

    Args:
        fragments: Number of fragments: whole layers, of as equal size as they allow; at least 1. Merges go round.
        delay: Groups from the merge of a fragment until its result is used; at least 0. A fragment that is merged again
            before takes its result first.
        mix: Share of the anchor in what a branch goes on from, in (0, 1].
        bits: Of a number on its way: 32, 8, or 4, which are whole numbers from -7 to 7, not the authors' floats.
        lr: Outer learning rate; more than 0.
        momentum: Outer momentum, in [0, 1).

    Raises:
        ValueError: If an argument is out of range; at the start if there are more fragments than layers, or the run
            goes on from one with other ``fragments``, or, in mid-delay, from 32 bits with fewer or the reverse.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=1)
        >>> _ = branches.weights(0)["weight"].fill_(1.0)
        >>> policy = StreamingOuterStep(fragments=1, delay=1, mix=0.5, bits=32, lr=1.0, momentum=0.0)
        >>> state = policy.init(branches)
        >>> _ = branches.weights(0)["weight"].fill_(0.0)
        >>> policy.merge(state, branches)
        >>> _ = branches.weights(0)["weight"].fill_(-1.0)
        >>> policy.after_group(state, branches)
        >>> branches.weights(0)
        {'weight': tensor([[-0.5000]])}

    References:
        Douillard et al., "Streaming DiLoCo with overlapping communication", 2025, algorithm 2.
    """

    fragments: int = 4
    delay: int = 1
    mix: float = 0.5
    bits: Bits = 8
    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        settle(
            self,
            fragments=whole("fragments", self.fragments, 1, LISTED),
            delay=whole("delay", self.delay, 0),
            mix=number("mix", self.mix, "(0, 1]"),
            bits=checked_bits(self.bits),
            lr=number("lr", self.lr, "(0, inf)"),
            momentum=number("momentum", self.momentum, "[0, 1)"),
        )

    def init(self, branches: Branches) -> State:
        return {
            **OuterStep(self.lr, self.momentum).init(branches),
            "fragments": divided(branches.live, self.fragments),
            "merges": 0,
            "waiting": {},  # groups until a fragment that was sent arrives
            "arrived": {},  # what has come before it is due, of a run that was saved
            "bits": self.bits,  # what has arrived are weights at 32, and their way with fewer
        }

    def last_good(self, state: State) -> Weights:
        """The anchor, which nothing of a branch that diverged has reached."""
        anchor: Weights = state["anchor"]
        return anchor

    def look_again(self, state: State, branches: Branches) -> None:
        self._refuse_other_settings(state)
        OuterStep(self.lr, self.momentum).look_again(state, branches)
        state["fragments"] = divided(branches.live, len(state["fragments"]), state["fragments"])

    def _refuse_other_settings(self, state: State) -> None:
        """What was divided, or is on its way, under other settings cannot be gone on with under these."""
        if (count := len(state["fragments"])) != self.fragments:
            raise ValueError(
                f"`fragments` must be {count}, as where the run goes on from, got {self.fragments}: what is on its"
                " way is of those fragments. Keep it, or load the weights alone and start anew."
            )
        if state["arrived"] and (state["bits"] == 32) != (self.bits == 32):
            raise ValueError(
                f"`bits` must be {state['bits']}, as where the run goes on from, got {self.bits}: with 32 weights are"
                f" sent, and with fewer their way, and {len(state['arrived'])} tensors are on their way. Keep it, or go"
                " on from a file in which nothing is."
            )
        state["bits"] = self.bits

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        fragment = state["merges"] % len(state["fragments"])
        state["merges"] += 1
        self._take_in(state, branches, fragment)
        names, parameters, anchor = state["fragments"][fragment], branches.parameters, state["anchor"]
        if buffers := [name for name in names if name not in parameters]:
            branches.assign(branches.mean(names=buffers))

        def sent(own: Weights) -> Weights:
            # In full precision the weights themselves, so that one fragment at once is `OuterStep` to the last bit.
            chosen = {name: own[name] for name in names if name in parameters}
            return chosen if self.bits == 32 else {n: anchor[n].to(t.device) - t for n, t in chosen.items()}

        branches.on_the_way[fragment] = branches.start_mean(sent, self.bits)
        state["waiting"][fragment] = self.delay
        if self.delay == 0:
            self._take_in(state, branches, fragment)

    @torch.no_grad()
    def after_group(self, state: State, branches: Branches) -> None:
        for fragment in list(state["waiting"]):
            state["waiting"][fragment] -= 1
            left = state["waiting"][fragment]
            if left == 0:
                self._take_in(state, branches, fragment)
            elif left == self.delay // 2 and fragment in branches.on_the_way:
                branches.on_the_way[fragment].advance()  # at a step that all processes know

    @torch.no_grad()
    def settle(self, state: State, branches: Branches) -> None:
        while branches.on_the_way:
            _, arriving = branches.on_the_way.popitem()
            state["arrived"] |= {name: tensor.cpu() for name, tensor in arriving.result().items()}

    def _take_in(self, state: State, branches: Branches, fragment: int) -> None:
        """What has arrived of a fragment, if it was sent, makes an outer step."""
        if state["waiting"].pop(fragment, None) is None:
            return
        arriving, kept = branches.on_the_way.pop(fragment, None), state["arrived"]
        names = [name for name in state["fragments"][fragment] if name in kept]
        arrived = {name: kept.pop(name) for name in names} if arriving is None else arriving.result()
        new: Weights = {}
        for name, tensor in weights.to_devices(arrived, {n: branches.live[n].device for n in arrived}).items():
            anchor, velocity = state["anchor"][name].to(tensor), state["momentum"][name].to(tensor)
            gradient = anchor - tensor if self.bits == 32 else tensor
            new[name], velocity = stepped(anchor, velocity, gradient, self.lr, self.momentum)
            state["anchor"][name].copy_(new[name])
            state["momentum"][name].copy_(velocity)
        self._go_on_from(new, branches)

    def _go_on_from(self, new: Weights, branches: Branches) -> None:
        if self.mix == 1:
            branches.assign(new)
            return
        for branch in branches.own:
            own = branches.weights(branch)
            own = {name: own[name] for name in new}
            weights.copy_(own, {n: own[n].to(anchor).lerp(anchor, self.mix) for n, anchor in new.items()})
