"""DDSM's search: widths for all timesteps, evolved for quality and little arithmetic. Needs pymoo.

Source: Yang et al., "Denoising Diffusion Step-aware Models", ICLR 2024, section 3.3 (NSGA-II; single-point crossover,
every gene mutates with a small probability, the constant strategies are in the first population).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pydenoise.samplers.ddsm import Strategy
from pydenoise.samplers.slimmable import check_widths


@dataclass(frozen=True)
class Candidate:
    """A strategy that was evaluated: its ``quality`` (less is better) and the mean ``cost`` of its calls."""

    strategy: Strategy
    quality: float
    cost: float


@dataclass(frozen=True)
class SearchResult:
    """``best``: least weighted sum of all evaluated; ``front``: those that none other beats in both, by cost.

    ``evaluated``: every strategy that was evaluated, in order.
    """

    best: Candidate
    front: tuple[Candidate, ...]
    evaluated: tuple[Candidate, ...]


def search_strategy(
    quality: Callable[[Strategy], float],
    costs: Mapping[float, float],
    *,
    num_timesteps: int = 1000,
    population: int = 50,
    generations: int = 10,
    mutation: float = 0.001,
    quality_weight: float = 1.0,
    cost_weight: float = 0.001,
    objectives: str = "sum",
    seed: int = 0,
) -> SearchResult:
    """Strategies by NSGA-II (Deb et al., 2002).

    Args:
        quality: of the samples that a strategy makes, less is better: FID in the paper, of 4096 images. No strategy is
            evaluated twice.
        costs: of one call at each width, ``Slimmable.macs``; the unit of ``cost_weight`` (the paper's: millions).
        population, generations: strategies at a time, and how many rounds.
        mutation: probability that a timestep's width is drawn anew.
        objectives: "sum": quality_weight * quality + cost_weight * mean cost (the public code's); "pareto": both as
            objectives of their own, which spreads the population along the trade-off.

    Raises:
        ImportError: without pymoo (``pip install pydenoise[search]``).
        TypeError, ValueError: a bad argument; a quality that is NaN.
    """
    _check(quality, num_timesteps, population, generations, mutation, quality_weight, cost_weight, objectives)
    widths = check_widths(tuple(costs))
    evaluate = _Evaluation(quality, costs, widths)
    first = np.random.default_rng(seed).integers(len(widths), size=(population, num_timesteps))
    for i in range(min(len(widths), population)):
        first[i] = i
    weights = (quality_weight, cost_weight) if objectives == "sum" else None
    _evolve(evaluate, first, len(widths), generations, mutation, weights, seed)
    done = tuple(evaluate.done.values())
    best = min(done, key=lambda c: quality_weight * c.quality + cost_weight * c.cost)
    return SearchResult(best, _front(done), done)


class _Evaluation:
    """Genes (places in ``widths``) to candidates, each strategy once."""

    def __init__(self, quality, costs, widths):
        self._quality, self._costs, self._widths = quality, costs, widths
        self.done: dict[bytes, Candidate] = {}

    def __call__(self, genes: np.ndarray) -> Candidate:
        genes = np.asarray(genes, dtype=np.int64)
        key = genes.tobytes()
        if key not in self.done:
            strategy = Strategy(tuple(self._widths[g] for g in genes))
            value = float(self._quality(strategy))
            if math.isnan(value):
                raise ValueError("quality: NaN for a strategy")
            self.done[key] = Candidate(strategy, value, strategy.mean_cost(self._costs))
        return self.done[key]


def _evolve(evaluate, first, choices, generations, mutation, weights, seed) -> None:
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.pntx import SinglePointCrossover
        from pymoo.optimize import minimize
    except ImportError as error:
        raise ImportError("search_strategy: needs pymoo; pip install 'pydenoise[search]'") from error

    class Problem(ElementwiseProblem):
        def __init__(self):
            super().__init__(n_var=first.shape[1], n_obj=2 if weights is None else 1, xl=0, xu=choices - 1, vtype=int)

        def _evaluate(self, x, out, *args, **kwargs):
            found = evaluate(x)
            pair = [found.quality, found.cost]
            out["F"] = pair if weights is None else [weights[0] * pair[0] + weights[1] * pair[1]]

    class Redraw(Mutation):
        def __init__(self, generator: np.random.Generator):
            super().__init__(prob=1.0)
            self._generator = generator

        def _do(self, problem, X, **kwargs):
            drawn = self._generator.integers(choices, size=X.shape)
            return np.where(self._generator.random(X.shape) < mutation, drawn, X)

    algorithm = NSGA2(
        pop_size=len(first), sampling=first, crossover=SinglePointCrossover(prob=1.0),
        mutation=Redraw(np.random.default_rng(seed + 1)), eliminate_duplicates=True,
    )  # fmt: skip
    minimize(Problem(), algorithm, ("n_gen", generations), seed=seed, verbose=False)


def _front(done: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    front, least = [], math.inf
    for candidate in sorted(done, key=lambda c: (c.cost, c.quality)):
        if candidate.quality < least:
            front.append(candidate)
            least = candidate.quality
    return tuple(front)


def _check(quality, num_timesteps, population, generations, mutation, quality_weight, cost_weight, objectives) -> None:
    if not callable(quality):
        raise TypeError(f"quality: expected a callable, got {type(quality).__name__}")
    numbers = {"num_timesteps": (num_timesteps, 2), "population": (population, 2), "generations": (generations, 1)}
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not 0 <= mutation <= 1:
        raise ValueError(f"mutation: expected a probability, got {mutation}")
    for name, value in (("quality_weight", quality_weight), ("cost_weight", cost_weight)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if objectives not in ("sum", "pareto"):
        raise ValueError(f"objectives: expected one of 'sum', 'pareto', got {objectives!r}")
