"""Schedules: when weights are merged. And the lengths that "when" can be said in."""

from lightning_merge.schedules._anneal import anneal
from lightning_merge.schedules._before_end import BeforeEnd
from lightning_merge.schedules._duration import Duration
from lightning_merge.schedules._every import AtValidations, EveryNEpochs, EveryNSteps, FromStart, LocalSteps
from lightning_merge.schedules._moment import Moment, RunLength, Schedule

__all__ = [
    "AtValidations",
    "BeforeEnd",
    "Duration",
    "EveryNEpochs",
    "EveryNSteps",
    "FromStart",
    "LocalSteps",
    "Moment",
    "RunLength",
    "Schedule",
    "anneal",
]
