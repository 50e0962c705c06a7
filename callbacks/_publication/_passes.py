"""Which weights validation measures, and which metric was measured on which weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge._eval_mode import forget_what_eval_mode_kept
from lightning_merge._ranks import gathered, several
from lightning_merge.callbacks._lightning._metrics import (
    batches_so_far,
    logged_under,
    unlogged,
    validating,
    validation_loop,
    written_metrics,
)
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._publication._agreement import Agreement
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._canary import Canary
from lightning_merge.callbacks._publication._exchange import Exchange
from lightning_merge.callbacks._publication._ledger import RAW, Entry, Ledger
from lightning_merge.callbacks._publication._pass import Pass, decides, is_number, some
from lightning_merge.weights import Weights

_PROBE = "probe/"
"""Prefix of what is measured only to be looked at."""


class Validation:
    """Takes the place of the validation loop's ``run``: one run of it for each set of weights that is measured.

    Wrapping ``run`` puts every hook of the module and of callbacks under the weights that are measured. Callback hooks
    could not: they run before the module's own.
    """

    def __init__(self, publisher: Exchange) -> None:
        self._publisher = publisher
        self._canary = Canary()
        self._current: Pass | None = None
        self._at_the_end = False  # whether what is measured now is only measured, after everything was decided
        self._ledger = Ledger()
        self.agreed = Agreement()
        self._measured_at: dict[str, tuple[int, int]] = {}  # set -> its version when it was last measured
        self._said: set[str] = set()  # sets whose metrics have been named
        self._before: dict[str, Any] = {}  # the metrics when the pass that is going on began

    def wrap(self, patches: Patches) -> None:
        """Installs itself."""
        patches.replace(self._loop, "run", self._validate)

    def announce(self) -> None:
        """Says once per fit what is averaged."""
        averages = self._publisher.averages
        lines = [f"{average.title} averages {average.describe()}." for average in averages]
        lines += [
            f"{average.title} leaves {len(names)} quantised, packed or integer parameters alone: {some(names)}."
            for average in averages
            if (names := average.left_alone)
        ]
        rank_zero_info("\n".join([*lines, *(line for average in averages for line in average.remarks())]))

    def _name_metrics(self, passes: list[Pass]) -> None:
        """Says under which names a set is measured, at its first validation: by then it is known what is logged."""
        for pass_ in passes:
            if pass_.holds in self._said:
                continue
            self._said.add(pass_.holds)
            title = "the raw weights" if pass_.average is None else pass_.average.title
            waiting = [a.title for a in self._publisher.averages if a.validate != "raw" and not a.ready]
            until = f", also in the place of {', '.join(waiting)} until it is ready" if waiting else ""
            if names := self._ledger.keys_of(pass_.holds):
                rank_zero_info(f"Validation measures {title} as {some(names)}{until if pass_.average is None else ''}.")

    def measure_final(self, ready: list[Average], and_raw: bool = False) -> None:
        """Measures the final sets that no validation has seen, where there is a validation loader."""
        trainer = self._publisher.trainer
        ready = [average for average in ready if average.final_validation]
        if not ready or not trainer.enable_validation:
            return
        passes = [Pass(average, [self._prefix(average)]) for average in ready]
        if and_raw or any(average.validate == "both" for average in self._publisher.averages):
            passes.insert(0, Pass(None, ["" if self.owner is None else f"{RAW}/"]))
        self._at_the_end = True
        for pass_ in passes:
            if self._measured_at.get(pass_.holds) == self._version(pass_.average):
                continue
            try:
                with validating(trainer), self._muted():
                    self._run(pass_, self._loop.run.__wrapped__)
            except Exception as error:
                if several() or (not and_raw if pass_.average is None else pass_.average.validate != "raw"):
                    raise
                rank_zero_warn(pass_.unmeasured(error))  # the run was asked for raw weights, and those are trained

    def forget(self, average: Average) -> None:
        """What was measured on an average is not about what will be published in its place."""
        self._measured_at.pop(average.name, None)

    def probe(self, average: Average, tensors: Weights) -> dict[str, float]:
        """What validation measures on any weights in the place of an average's.

        Nothing is logged or remembered, and no callback sees it.
        """
        trainer = self._publisher.trainer
        remembered = self._ledger.copy(), dict(self._measured_at)
        at_the_end, self._at_the_end = self._at_the_end, True
        try:
            with unlogged(trainer), isolate_rng():
                self._run(Pass(average, [_PROBE]), self._loop.run.__wrapped__, tensors)
                found = dict(self._metrics)
        finally:
            self._at_the_end = at_the_end
            self._ledger, self._measured_at = remembered
        # The ranks must decide alike, also where a metric is not synchronised.
        return self.agreed(
            {
                key.removeprefix(_PROBE): float(value)
                for key, value in found.items()
                if key.startswith(_PROBE) and is_number(value)
            }
        )

    def set_of(self, monitor: str) -> str:
        """Name of the set that a monitored metric is measured on: raw for what is logged while training."""
        self._settle()
        if (entry := self._ledger.get(monitor)) is not None:
            if monitor in self._ledger.contested - self._said:
                self._said.add(monitor)
                when = "validation" if entry.validated else "training"
                rank_zero_info(
                    f"`{monitor}` is logged both in training and in validation. A checkpoint that monitors it holds the"
                    f" weights of the later one: now of {when}, {entry.holds!r}. Log it under two names."
                )
            return entry.holds
        # Nothing of that name has been measured yet.
        primary = self._publisher.primary
        by_prefix = {self._prefix(average): average.name for average in self._publisher.averages}
        if (prefix := f"{monitor.partition('/')[0]}/") in by_prefix:
            return by_prefix[prefix]
        return RAW if self._ledger or self.owner is None or prefix == f"{RAW}/" else primary.name

    @property
    def running(self) -> "Pass | None":
        """The pass that is going on."""
        return self._current

    @property
    def is_evaluation(self) -> bool:
        """Whether the validation run that is going on measures the raw weights for a rule to decide by."""
        return self._current is not None and self._current.average is None and not self._at_the_end

    def is_judging(self, average: Average) -> bool:
        """Whether the validation run that is going on is the regular one of this average."""
        return self._current is not None and self._current.average is average and not self._at_the_end

    def has_logged(self, monitor: str, average: Average | None = None) -> bool:
        """Whether the validation run that is going on has logged a metric. What an earlier one did stays in place.

        A metric that it has left out is said, once.
        """
        keys = {monitor, monitor if average is None else self._prefix(average) + monitor}
        found = any(self._metrics.get(key) is not self._before.get(key) for key in keys)
        if not found and any(key in self._metrics for key in keys):
            self.say_left_out(monitor)
        return found

    def knows(self, monitor: str) -> bool:
        """Whether any validation of this fit has logged a metric, of whatever set."""
        holds = (RAW, *(average.name for average in self._publisher.averages))
        return any(gathered(any(monitor in self.metrics_of(each) for each in holds)))

    def say_left_out(self, monitor: str) -> None:
        """Says, once per fit, that a validation has not logged a metric that others did."""
        if f"left out: {monitor}" not in self._said:
            self._said.add(f"left out: {monitor}")
            rank_zero_info(f"This validation has not logged `{monitor}`: nothing is decided by it where it is missing.")

    def is_measured(self, average: Average | None, monitor: str | None = None) -> bool:
        """Whether a validation run has measured (or is measuring) just these weights, and a metric with them."""
        holds = RAW if average is None else average.name
        if self._current is not None and self._current.holds == holds:
            return True
        version = self._version(average)
        return self._measured_at.get(holds) == version and not self._ledger.is_outdated(monitor, version)

    def say_outdated(self, monitor: str, holds: str) -> None:
        """Says, once per fit, that a file gets the score of an earlier validation, and its set is a later one."""
        self._ledger.say_outdated(monitor, holds)

    def metrics_of(self, holds: str) -> dict[str, float]:
        """The metrics last measured on a set, without its prefix."""
        self._settle()
        metrics = self._metrics
        owns_plain_names = self.owner is not None and self.owner.name == holds
        prefix = "" if owns_plain_names else f"{holds}/"
        return {
            key.removeprefix(prefix): float(metrics[key])
            for key in self._ledger.keys_of(holds)
            if key in metrics and is_number(metrics[key])
        }

    @property
    def _metrics(self) -> dict[str, Any]:
        return written_metrics(self._publisher.trainer)

    def _settle(self) -> list[str]:
        """Notes who measured what was written since the last look: the pass that is going on, or training."""
        average = None if self._current is None else self._current.average
        holds = RAW if average is None else average.name
        return self._ledger.settle(self._metrics, Entry(holds, self._version(average), self._current is not None))

    @property
    def _loop(self) -> Any:
        return validation_loop(self._publisher.trainer)

    @property
    def owner(self) -> Average | None:
        """The average whose metrics have plain names; ``None``: the raw weights do, since a rule decides on them."""
        averages = self._publisher.averages
        raw_owns = averages[0].validate == "raw" or any(average.decides_on_score for average in averages)
        return None if raw_owns else averages[0]

    def _prefix(self, average: Average) -> str:
        return "" if average is self.owner else f"{average.name}/"

    def _version(self, average: Average | None) -> tuple[int, int]:
        """Changes whenever the set does."""
        if average is not None:
            return average.version
        # Steps of optimizers that Lightning does not see are not in its `global_step`; and a batch without a step may
        # change buffers, as the statistics of BatchNorm.
        publisher = self._publisher
        batches = batches_so_far(publisher.trainer) if publisher.inventory.buffers else 0
        return publisher.trainer.global_step, batches + sum(other.steps for other in publisher.averages)

    def _passes(self) -> list[Pass]:
        """What a validation measures: raw, then the other averages, the primary last.

        Callbacks that decide by a metric see the last run only, and the metrics of all of them.
        """
        averages = self._publisher.averages
        raw = Pass(None, [""] if self.owner is None else [])
        if self.owner is not None and any(average.validate != "merged" for average in averages):
            raw.prefixes.append(f"{RAW}/")
        passes = [raw]
        for average in averages:
            if average.validate == "raw":
                continue
            if average.ready:
                passes.append(Pass(average, [self._prefix(average)]))
            else:
                # What would be published now are the raw weights, so its metrics are theirs.
                raw.prefixes.append(self._prefix(average))
        return sorted((p for p in passes if p.prefixes), key=lambda p: p.average is averages[0])

    def _validate(self, original: Callable[[], Any]) -> Any:
        if self._publisher.trainer.sanity_checking:
            return original()
        self._publisher.check_progress()
        *extra, last = passes = self._passes()
        try:
            for pass_ in extra:
                with self._muted():
                    self._run(pass_, original)
            outputs = self._run(last, original)
            self._name_metrics(passes)
            return outputs
        finally:
            # DDP sent the first rank's buffers to all in the validation's first forward pass, and takes them for sent.
            # With merged buffers in place those were not the raw ones, which it has to send again.
            model = self._publisher.trainer.model
            if hasattr(model, "require_forward_param_sync"):
                model.require_forward_param_sync = True

    def _run(self, pass_: Pass, original: Callable[[], Any], tensors: Weights | None = None) -> Any:
        self._settle()
        before = self._before = dict(self._metrics)
        with ExitStack() as stack:
            rest = self._publisher.apart.rest_of_first
            if pass_.average is None and (first := rest({})):
                stack.enter_context(self._publisher.in_place(first))
            if pass_.average is not None:
                if tensors is None:
                    self._publisher.apart.make_one(pass_.average)
                # Making the set may run the module, which the canary must not see.
                merged = self._publisher.set_of(pass_.average) if tensors is None else tensors
                stack.enter_context(self._canary.watch(self._publisher, pass_.average, merged))
                stack.enter_context(self._publisher.swapped(pass_.average, {**rest(merged), **merged}))
            if pass_.average is not None or any(average.validate != "raw" for average in self._publisher.averages):
                # Lightning puts flags back after a validation, and calls no `train()`.
                forget_what_eval_mode_kept(self._publisher.module)
                stack.callback(forget_what_eval_mode_kept, self._publisher.module)
            outer, self._current = self._current, pass_
            try:
                with logged_under(self._publisher.trainer, pass_.prefixes):
                    outputs = original()
                self._prefix_the_rest(pass_, before)
                self._settle()
            finally:
                self._current = outer
        self._measured_at[pass_.holds] = self._version(pass_.average)
        return outputs

    def _prefix_the_rest(self, pass_: Pass, before: dict[str, Any]) -> None:
        """Puts under a prefix what a pass with prefixes wrote to ``callback_metrics`` by hand."""
        if not pass_.prefixes or "" in pass_.prefixes:
            return
        metrics = self._metrics
        for key in self._ledger.changed(metrics):
            if not key.startswith(tuple(pass_.prefixes)):
                value = metrics.pop(key)
                metrics.update({prefix + key: value for prefix in pass_.prefixes})
                if key in before:
                    metrics[key] = before[key]

    @contextmanager
    def _muted(self) -> Iterator[None]:
        """An extra run: callbacks that decide or save by a metric do not see it, random numbers stay as they were."""
        trainer = self._publisher.trainer
        callbacks = trainer.callbacks
        trainer.callbacks = [callback for callback in callbacks if not decides(callback)]
        try:
            with isolate_rng():
                yield
        finally:
            trainer.callbacks = callbacks
