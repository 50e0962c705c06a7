"""A model of the score chooses what to try next."""

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, final

from lightning_merge._checks import LISTED, settle, whole
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Space, one_hot


@final
@dataclass(frozen=True)
class Bayesian(Method):
    """Where a Gaussian process expects the largest improvement (optuna's ``GPSampler``).

    It takes the fewest evaluations as long as there are few ingredients: up to about ten. It starts with each of
    them as it is, and with random coefficients. It needs optuna: ``pip install "lightning-merge[search]"``.

    Args:
        random_starts: Random coefficients before the model chooses; at least 1.

    Raises:
        ValueError: If ``random_starts`` is out of range.
        ImportError: When the search begins, if optuna is not installed.

    References:
        Liu et al., "Checkpoint merging via Bayesian optimization in LLM pretraining", 2024. Akiba et al., "Optuna: a
        next-generation hyperparameter optimization framework", KDD 2019.
    """

    endless: ClassVar[bool] = True

    random_starts: int = 4

    def __post_init__(self) -> None:
        settle(self, random_starts=whole("random_starts", self.random_starts, 1, LISTED))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        if find_spec("optuna") is None:
            raise ImportError('Bayesian search needs optuna: pip install "lightning-merge[search]".')
        import optuna

        units: dict[str, Any] = {
            f"x{index}": optuna.distributions.FloatDistribution(0.0, 1.0) for index in range(space.dimensions(count))
        }
        with _quiet(optuna):
            sampler = optuna.samplers.GPSampler(seed=rng.randrange(2**31), n_startup_trials=count + self.random_starts)
            study = optuna.create_study(sampler=sampler, direction="maximize")
            for index in range(count):
                study.enqueue_trial(dict(zip(units, space.to_unit(space.alike(one_hot(count, index))), strict=True)))
        while True:
            with _quiet(optuna):
                trial = study.ask(units)
            answer = yield space.from_unit([trial.params[name] for name in units])
            if answer.value == -math.inf:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, answer.value)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's log lines and its note that the sampler is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
