"""Hyper-parameter search with a budget: random, TPE, and successive halving that ends hopeless trials early, through Optuna.

Random: Bergstra and Bengio 2012. TPE: Bergstra et al. 2011. Successive halving: Jamieson and Talwalkar 2016 (arXiv:1502.07943).
The objective sees training and validation data only; the test set is looked at once, with the settings found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from labkit.types import LabkitError

SAMPLERS = ("random", "tpe")


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`; log=True: every factor of ten gets equal attention."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Found:
    """`best` settings and their `value`; `trials`: one dict a trial (settings, value, steps, state)."""

    best: dict[str, Any]
    value: float
    trials: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Steps spent in all."""
        return sum(trial["steps"] for trial in self.trials)

    def frame(self) -> Any:
        import pandas as pd

        return pd.DataFrame(self.trials)


def search(
    objective: Callable[[dict[str, Any], Callable[[int, float], None]], float],
    space: Mapping[str, Between | tuple],
    *,
    trials: int = 20,
    steps: int | None = None,
    sampler: str = "tpe",
    halving: int | None = None,
    seed: int = 0,
) -> Found:
    """Look for the settings with the least objective(settings, report), by default a validation loss.

    space: name -> Between(...) or a tuple of choices. The budget is `trials`, and `steps` over all trials when given: no trial
    begins after it is spent. report(step, value) tells how a trial stands; with halving=n, trials not among the better half at
    n, 2n, 4n ... steps end there. LabkitError for a senseless request or when no trial ends.
    """
    _check(space, sampler, trials)
    optuna = _optuna()
    pruner = optuna.pruners.SuccessiveHalvingPruner(halving, 2, 0) if halving else optuna.pruners.NopPruner()
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    study = optuna.create_study(sampler=samplers[sampler](seed=seed), pruner=pruner)
    spent: dict[int, int] = {}

    def one(trial: Any) -> float:
        spent[trial.number] = 0

        def report(step: int, value: float) -> None:
            spent[trial.number] = step
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return objective({name: _suggest(trial, name, values) for name, values in space.items()}, report)

    for _ in range(trials):
        if steps is not None and sum(spent.values()) >= steps:
            break
        study.optimize(one, n_trials=1)
    rows = [{**t.params, "value": t.value, "steps": spent[t.number], "state": t.state.name.lower()} for t in study.trials]
    if not any(row["state"] == "complete" for row in rows):
        raise LabkitError(f"None of {len(rows)} trials ran to its end; give a larger budget.")
    return Found(study.best_params, study.best_value, rows)


def _suggest(trial: Any, name: str, values: Between | tuple) -> Any:
    if isinstance(values, Between):
        return trial.suggest_float(name, values.low, values.high, log=values.log)
    return trial.suggest_categorical(name, list(values))


def _check(space: Mapping[str, Between | tuple], sampler: str, trials: int) -> None:
    if sampler not in SAMPLERS or trials < 1 or not space:
        raise LabkitError(
            f"sampler={sampler!r}, trials={trials}, {len(space)} settings given; expected {' or '.join(SAMPLERS)}, one or more."
        )
    for name, values in space.items():
        if isinstance(values, Between) and not (values.low < values.high and (values.low > 0 or not values.log)):
            raise LabkitError(f"{name}: from {values.low} to {values.high} given; expected low below high, and above 0 for log.")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise LabkitError('Optuna is not installed; the search needs it. Try:  pip install "labkit[track]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
