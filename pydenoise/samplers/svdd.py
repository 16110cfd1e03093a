"""SVDD: sampling towards a reward that needs no gradient, by choosing among candidates of every step.

Source: Li et al., "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding", 2024. A noisy step is drawn several times from one mean; a value says how much reward each candidate leads
to, and one of them goes on. Drawn in proportion to exp(value / alpha) they sample p(x) exp(reward(x) / alpha), as far
as the values are right and the candidates many.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._evaluate import evaluate, repeated
from pydenoise.samplers._noise import gumbel_noise, initial_noise
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import check_count
from pydenoise.samplers.runtime import FLOATS, Sampler

METHODS = ("pm", "mc")
_CHOICE = 2**31  # the number of the first choice's random numbers
_CANDIDATE = (
    2**16
)  # numbers between the noise of one candidate and that of the next; the first one's is a sampler's own

Selection = Callable[[int, Tensor, Tensor], None]


class SVDD:
    """``sampler`` with a choice among candidates after every step that has noise.

    Args:
        sampler: of a solver without history whose steps have noise: DDPM(), DDIM(eta > 0), ... Its guidance, clip and
            other options count; dynamic_threshold does not go with it.
        reward: "pm": ``reward(x0) -> [n]`` for predicted clean samples x0 [n, ...], any function; "mc": a value
            function ``reward(x, t) -> [n]`` of candidates x [n, ...] at times t [n]. Higher is better; -inf excludes.
        method: "pm" (posterior mean): a candidate's value is the reward of the x0 that the denoiser predicts from it.
            The output of the one that is chosen serves the next step, so N steps of M candidates are 1 + (N - 1) M
            calls per sample. "mc": a learned value, N calls.
        candidates: M.
        alpha: ``None``: the best candidate goes on, which is also what the public code does; above 0: one drawn with
            probabilities softmax(value / alpha).
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: Callable[..., Tensor],
        *,
        method: str = "pm",
        candidates: int = 10,
        alpha: float | None = None,
    ):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        if not callable(reward):
            raise TypeError(f"reward: expected a callable, got {type(reward).__name__}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
        plan = sampler.plan
        if not plan.needs_noise or plan.slots or plan.uses_base or not sampler.solver.fixed_rows:
            raise ValueError(f"sampler: expected a solver without history whose steps have noise, got {sampler.solver}")
        if plan.start is not None or plan.predictions == 2:
            raise ValueError(f"sampler: {sampler.solver.name} begins at a degraded sample, SVDD at noise")
        if sampler.conversion.dynamic:
            raise ValueError("sampler: dynamic_threshold does not go with SVDD")
        if any(getattr(observer, "changes_sample", False) for observer in sampler.observers):
            raise ValueError("sampler: an observer that changes the sample does not go with SVDD")
        if check_count("candidates", candidates) >= 2**15:
            raise ValueError(f"candidates: expected less than {2**15}, got {candidates}")
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
            raise TypeError(f"alpha: expected a number or None, got {type(alpha).__name__}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number above 0 or None, got {alpha}")
        self.sampler, self.reward, self.method, self.alpha = sampler, reward, method, alpha
        self.candidates = int(candidates)

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        reward_conditioning: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_batch: int | None = None,
        progress: bool = False,
        on_selection: Selection | None = None,
    ) -> Tensor:
        """From noise ``x`` [B, ...], or noise of ``shape``, to samples.

        Args:
            conditioning, unconditional, generator, seed, dtype, device, progress: as in ``Sampler.sample``. With one
                candidate the result is that of the sampler with the same seed.
            reward_conditioning: keyword arguments of the reward; tensors have a row for each sample, or one.
            max_batch: the denoiser and the reward are given at most so many candidates at once.
            on_selection: called with the number of the step, the values [B, M] and the chosen ones [B] int64.

        Raises:
            TypeError, ValueError: a bad argument, or a bad result of the denoiser or the reward (NaN, another shape).
        """
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if (dtype if x is None else x.dtype) not in FLOATS or (x is not None and x.dim() < 1):
            raise ValueError(f"x: expected a floating-point tensor [B, ...], got {dtype if x is None else x.dtype}")
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch: expected a positive number, got {max_batch}")
        batch, device = (x.shape[0], x.device) if x is not None else (int(shape[0]), torch.device(device))
        keys = sample_keys(seed, generator, batch, device)
        if x is None:
            sampler = self.sampler
            x = initial_noise(tuple(shape), keys, sampler.plan.initial_scale, dtype, sampler._setting.backend)
        run = _Run(self, x, keys, max_batch, conditioning, unconditional, reward_conditioning)
        with torch.no_grad(), Progress(progress, "SVDD", self.sampler.plan.calls) as line:
            return run.steps(x.detach().contiguous(), line, on_selection)


class _Run:
    """One batch: the tables, the buffers of the candidates and the calls of denoiser and reward."""

    def __init__(self, own: SVDD, x: Tensor, keys: Tensor, max_batch, conditioning, unconditional, rewarded):
        sampler, exact = own.sampler, torch.float64 if x.dtype == torch.float64 else torch.float32
        self._own, self._sampler, self._keys, self._plan = own, sampler, keys, sampler.plan
        self._backend, self._size = sampler._setting.backend, max_batch
        table = sampler.plan.table.clone()
        if sampler.guidance is not None:
            table[:, C.GUIDANCE] = torch.tensor(sampler.guidance, dtype=torch.float64)
        self._table = table.to(x.device, exact)
        only_x0 = torch.zeros_like(self._table)
        for column in (C.GUIDANCE, C.X0_SAMPLE, C.X0_OUTPUT, C.CLIP):
            only_x0[:, column] = self._table[:, column]
        only_x0[:, C.SLOT] = -1
        self._only_x0 = only_x0
        whole = sampler.schedule.kind == "vp" and all(t == round(t) for t in sampler.times)
        self._times = torch.tensor(sampler.times).to(torch.int64 if whole else exact).to(x.device)
        scales = sampler.plan.table[:-1, C.INPUT_SCALE].tolist()
        self._scales = [sampler.first_input_scale, *scales]
        guided, batch, many = sampler.guidance is not None, x.shape[0], own.candidates
        self._conditions = {1: Conditions(conditioning, unconditional, x, guided)}
        Conditions(rewarded, None, x, False)
        like = x.new_empty(1).expand(many * batch, *x.shape[1:])
        more = [repeated(given, batch, many) for given in (conditioning, unconditional)]
        self._conditions[many] = Conditions(*more, like, guided)
        self._rewarded = Conditions(repeated(rewarded, batch, many), None, like, False)
        self._chosen_from = torch.arange(batch, device=x.device)

    def steps(self, x: Tensor, line: Progress, on_selection: Selection | None) -> Tensor:
        noisy, outputs = set(self._plan.noisy_calls), None
        for observer in self._sampler.observers:
            if hasattr(observer, "begin_run"):
                observer.begin_run(self._sampler.times)
        for call in range(self._plan.calls):
            if outputs is None:
                outputs = self._denoise(x, call, 1)
            many = self._own.candidates if call in noisy and call + 1 < self._plan.calls else 1
            drawn = x.new_empty(many, *x.shape)
            for number in range(many):
                self._launch(x, outputs, self._table, call, step=call + 1 + _CANDIDATE * number, out=drawn[number])
            outputs = None
            if many == 1:
                x = drawn[0]
            else:
                values, outputs = self._values(drawn.flatten(0, 1), call + 1)
                best = self._choose(values, call)
                x = drawn[best, self._chosen_from]
                outputs = outputs and [None if o is None else self._of(o, best) for o in outputs]
                if on_selection is not None:
                    on_selection(call, values, best)
            if not bool(x.isfinite().all()):
                raise ValueError(f"denoiser: the sample is not finite after call {call} of {self._plan.calls}")
            line.advance()
        return x

    def _of(self, values: Tensor, best: Tensor) -> Tensor:
        """Of [M B, ...], those of the chosen candidates."""
        return values.unflatten(0, (-1, len(best)))[best, self._chosen_from]

    def _launch(self, x: Tensor, outputs: Sequence[Tensor | None], table: Tensor, call: int, **given) -> None:
        output, other = outputs
        seed = self._keys if len(self._keys) == x.shape[0] else None
        PF.sampler_step(
            x, output, table, call, unconditional=other, seed=seed,
            learned_variance=self._plan.learned_variance, backend=self._backend, **given,
        )  # fmt: skip

    def _pieces(self, count: int) -> list[slice]:
        size = self._size or max(count, 1)
        return [slice(begin, min(begin + size, count)) for begin in range(0, max(count, 1), size)]

    def _denoise(self, x: Tensor, call: int, copies: int) -> list[Tensor | None]:
        """(output, unconditional output or None) of x, which is so many copies of the batch."""
        parts = []
        for observer in self._sampler.observers:
            observer.begin_step(call, self._plan.calls)
        for part in self._pieces(x.shape[0]):
            times = self._times[call].expand(x[part].shape[0])
            given = self._conditions[copies].part(part)
            parts.append(evaluate(self._sampler, x[part], times, given, self._scales[call]))
        output, other = zip(*parts, strict=True)
        return [torch.cat(output), None if other[0] is None else torch.cat(other)]

    def _values(self, drawn: Tensor, call: int) -> tuple[Tensor, list[Tensor | None] | None]:
        """(values [B, M] of candidates [M B, ...] at the level of ``call``, their outputs where they were made)."""
        outputs = None
        valued: tuple[Tensor, ...] = (drawn, self._times[call].expand(drawn.shape[0]))
        if self._own.method == "pm":
            outputs = self._denoise(drawn, call, self._own.candidates)
            x0 = torch.empty_like(drawn)
            self._launch(drawn, outputs, self._only_x0, call, out=torch.empty_like(drawn), preview=x0)
            valued = (x0,)
        parts = []
        for part in self._pieces(drawn.shape[0]):
            given = [argument[part] for argument in valued]
            parts.append(self._checked(self._own.reward(*given, **self._rewarded.part(part)), given[0], call))
        return torch.cat(parts).view(self._own.candidates, -1).t(), outputs

    def _checked(self, value: object, x: Tensor, call: int) -> Tensor:
        where = f"after step {call} of {self._plan.calls}"
        if not isinstance(value, Tensor):
            raise TypeError(f"reward: expected a tensor {where}, got {type(value).__name__}")
        if tuple(value.shape) != (x.shape[0],):
            raise ValueError(f"reward: expected shape ({x.shape[0]},) {where}, got {tuple(value.shape)}")
        value = value.to(torch.float64)
        if bool(value.isnan().any()):
            raise ValueError(f"reward: NaN {where}, for {int(value.isnan().sum())} of {len(value)} candidates")
        return value

    def _choose(self, values: Tensor, call: int) -> Tensor:
        """int64 [B]: the best candidate, or one drawn by adding Gumbel noise to value / alpha."""
        if self._own.alpha is None:
            return values.argmax(1)
        noise = gumbel_noise(tuple(values.shape), self._keys, self._backend, _CHOICE + call)
        return (values / self._own.alpha + noise).argmax(1)
