"""LLaDA's sampler: blocks from left to right, in each of them the surest tokens first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.reference import _philox
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, noise_keys
from pydenoise.samplers.masked.options import NotANumber, check_int, check_number
from pydenoise.samplers.masked.predictor import Batch, Predictor, Sparsity, Step
from pydenoise.samplers.masked.prompts import Prompt, padded, prompts_of
from pydenoise.samplers.masked.result import Generation, StepInfo

REMASKING = ("low_confidence", "random")
_ORDER_STEP = 2**32 - 1  # of the noise that orders positions: no step of a generation
_NEVER = 2**31 - 1


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """How many tokens each of ``steps`` steps fills in: as equal as can be, the larger ones first."""
    base, more = divmod(block_length, steps)
    return [base + (i < more) for i in range(steps)]


class SemiAutoregressive:
    """Generation with a fixed length, block after block, as in LLaDA.

    Every step evaluates the model on the whole sequence, takes a token and its confidence at each masked position of
    the current block, and keeps the most confident ones. Tokens and confidences come from
    :func:`pydenoise.functional.token_confidence`, so no softmax over the vocabulary is stored, and positions outside
    the block cost nothing. On a GPU the steps of a block run without waiting for the device.

    Args:
        model: ``model(input_ids [B, L])`` gives logits [B, L, V] or an object with ``.logits``. Where prompts differ in
            length it is also given ``attention_mask`` (int64 [B, L], 1 for tokens), ``lengths`` or ``key_lengths``
            (int64 [B]), whichever it takes; each row holds its prompt, its new tokens, then padding.
        mask_token_id: the mask; never generated. It may be V itself: a mask that the model reads and never predicts.
        gen_length: tokens to generate, a multiple of ``block_length``.
        block_length: ``None``: one block.
        steps: of the whole generation, a multiple of the number of blocks and at most ``gen_length``.
        temperature: 0: the most likely tokens; else samples of softmax(logits / temperature).
        cfg_scale: w of ``u + (w + 1) (c - u)``, where u is predicted with the prompt masked; 0: no guidance.
        remasking: "low_confidence", or "random": positions are kept in random order.
        eos_token_id, eot_token_id: end of text and of turn; needed by the next two options.
        logits_eos_inf: the end of text is never generated.
        confidence_eos_eot_inf: True: both ends may be generated, but with confidence 0, so they come last. "repo": only
            the end of turn, as in the published code, whose assignment changes the logits of that one only.
        pad_token_id: what stands in the padding; ``None``: ``eos_token_id`` or 0.
        sparsity: an object whose ``begin_step(step, num_steps, new_tokens=, branch=)`` is called before every call of
            the model (such as the handle of ``pdn.attach_sparsed``); under guidance once for each branch.
        lm_head: the model's projection to the vocabulary, which then runs on the masked positions of the block only;
            "auto": ``model.get_output_embeddings()`` or ``model.lm_head``, if there is one; ``None``: never.
        backend: of ``token_confidence``.

    Differences from the published code: the mask is never generated (there it may be, and the position stays masked),
    guidance and softmax are computed in float32, whatever the logits' dtype.

    Source: Nie et al., Large Language Diffusion Models (2025), https://arxiv.org/abs/2502.09992, and its code.
    """

    def __init__(
        self,
        model: Callable,
        mask_token_id: int,
        *,
        gen_length: int = 128,
        block_length: int | None = None,
        steps: int = 128,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        eos_token_id: int | None = None,
        eot_token_id: int | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool | str = False,
        pad_token_id: int | None = None,
        sparsity: Sparsity | None = None,
        lm_head: nn.Module | str | None = "auto",
        backend: str = "auto",
    ):
        self.mask_token_id = check_int("mask_token_id", mask_token_id, 0)
        self.gen_length = check_int("gen_length", gen_length, 1)
        self.block_length = self.gen_length if block_length is None else check_int("block_length", block_length, 1)
        self.steps = check_int("steps", steps, 1)
        self._check_lengths()
        self.temperature = check_number("temperature", temperature, 0)
        self.cfg_scale = check_number("cfg_scale", cfg_scale, 0)
        if remasking not in REMASKING:
            raise ValueError(f"remasking: expected one of {REMASKING}, got {remasking!r}")
        self.remasking = remasking
        self.eos_token_id, self.eot_token_id = eos_token_id, eot_token_id
        self._forbidden = (self._token("eos_token_id", "logits_eos_inf"),) if logits_eos_inf else ()
        self._uncounted = self._without_confidence(confidence_eos_eot_inf)
        fallback = 0 if eos_token_id is None else eos_token_id
        self.pad_token_id = fallback if pad_token_id is None else check_int("pad_token_id", pad_token_id, 0)
        self.backend = backend
        self._predictor = Predictor(model, self.mask_token_id, self.cfg_scale, sparsity, lm_head)

    def _check_lengths(self) -> None:
        if self.gen_length % self.block_length:
            raise ValueError(
                f"gen_length: expected a multiple of block_length {self.block_length}, got {self.gen_length}"
            )
        blocks = self.gen_length // self.block_length
        if self.steps % blocks or self.steps > self.gen_length:
            raise ValueError(
                f"steps: expected a multiple of the number of blocks {blocks}, at most gen_length {self.gen_length}, "
                f"got {self.steps}"
            )

    def _token(self, name: str, needed_by: str) -> int:
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}: {needed_by} needs it, got None")
        return check_int(name, value, 0)

    def _without_confidence(self, choice: bool | str) -> tuple[int, ...]:
        if choice not in (False, True, "repo"):
            raise ValueError(f"confidence_eos_eot_inf: expected a bool or 'repo', got {choice!r}")
        if choice is False:
            return ()
        names = ("eot_token_id",) if choice == "repo" else ("eos_token_id", "eot_token_id")
        return tuple(self._token(name, "confidence_eos_eot_inf") for name in names)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Prompt,
        attention_mask: Tensor | None = None,
        *,
        seed: Seed = None,
        generator: Generator = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        callback: Callable[[StepInfo], None] | None = None,
        return_trajectory: bool = False,
    ) -> Generation:
        """Continue every prompt.

        Args:
            input_ids: int64 [B, P] or [P], or a list of prompts of any lengths; a prompt may be empty.
            attention_mask: [B, P], 0 for padding, which may lie on either side of a prompt.
            seed, generator: of the noise; one, or a list with one for each sample, which then gets the noise that it
                gets alone. ``None``: from torch's default generator. Not used without noise.
            device: where to generate; ``None``: where the prompts are.
            progress: a line on stderr.
            callback: called after every step.
            return_trajectory: keep the sequences of every step.

        Raises:
            TypeError, ValueError: bad arguments, or logits of a wrong shape or with NaN (the message names the step; on
                a GPU it is raised at the end of the block).
        """
        prompts = prompts_of(input_ids, attention_mask, self.mask_token_id, device)
        run = _Run(self, prompts)
        if self.temperature > 0 or self.remasking == "random":
            run.draw(seed, generator)
        states = [run.tokens.clone()] if return_trajectory else None
        with Progress(progress, "generating", self.steps) as bar:
            for step, info in run.steps():
                bar.advance()
                if states is not None:
                    states.append(run.tokens.clone())
                if callback is not None:
                    callback(StepInfo(step, self.steps, run.tokens, info))
        lengths = tuple(p.shape[0] for p in prompts)
        return Generation(
            run.tokens, lengths, tuple(n + self.gen_length for n in lengths), (run.nfe,) * len(prompts),
            run.calls, None if states is None else tuple(states),
        )  # fmt: skip


class _Run:
    """One generation: the tokens, and what is left to fill in. Everything but the loop's counters is on the device."""

    def __init__(self, options: SemiAutoregressive, prompts: list[Tensor]):
        self.options, self.predictor = options, options._predictor
        like = prompts[0]
        mask = like.new_full((options.gen_length,), options.mask_token_id)
        counts = [prompt.shape[0] for prompt in prompts]
        self.tokens = padded([torch.cat([prompt, mask]) for prompt in prompts], options.pad_token_id)
        self.device, self.batch = like.device, len(prompts)
        first = torch.tensor(counts).to(self.device)
        self.places = first[:, None] + torch.arange(options.gen_length, device=self.device)  # [B, gen_length]
        total = torch.arange(self.tokens.shape[1], device=self.device)
        self.prompt = (total < first[:, None]) if options.cfg_scale > 0 else None
        self.lengths = None if len(set(counts)) == 1 else first + options.gen_length
        self.new_tokens = self.tokens.shape[1] - min(counts)
        self.keys = self.order = None
        self.nfe, self.calls = 0, 0
        self.failed = torch.full((), _NEVER, device=self.device)

    def draw(self, seed: Seed, generator: Generator) -> None:
        """The keys of the noise, and a random order of the positions."""
        self.keys = noise_keys(seed, generator, self.batch, self.options.gen_length, self.device)
        if self.options.remasking == "random":
            order = _philox.words(self.keys.flatten(0, 1), _ORDER_STEP, 1)
            self.order = order.view(self.batch, -1)

    def steps(self):
        """Run all steps, yielding (step, evaluations so far) after each."""
        options = self.options
        blocks = options.gen_length // options.block_length
        counts = transfer_counts(options.block_length, options.steps // blocks)
        for block in range(blocks):
            masked = torch.arange(options.block_length, device=self.device) + block * options.block_length
            masked = masked.expand(self.batch, -1)
            for i, count in enumerate(counts):
                step = block * len(counts) + i
                masked = self._fill(masked, count, step)
                if not self.tokens.is_cuda:
                    self._check()
                yield step, self.nfe
            self._check()

    def _fill(self, masked: Tensor, count: int, step: int) -> Tensor:
        """Fill in ``count`` of the masked places [B, n] of the generated region; returns the others, ascending."""
        position = self.places.gather(1, masked)
        token, confidence = self._predict(masked, position, step)
        rank = confidence if self.order is None else self.order.gather(1, masked)
        ranking = rank.sort(dim=1, descending=True, stable=True).indices  # ties: the position on the left
        kept = ranking[:, :count]
        self.tokens.scatter_(1, position.gather(1, kept), token.gather(1, kept))
        return masked.gather(1, ranking[:, count:].sort(dim=1).values)

    def _predict(self, masked: Tensor, position: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Token and confidence at ``position`` [B, n]; notes the step if there is no answer."""
        options = self.options
        row = torch.arange(self.batch, device=self.device)[:, None].expand_as(position)
        before = self.predictor.calls
        state = Batch(self.tokens, self.prompt, self.lengths)
        at = Step(step, options.steps, self.new_tokens)
        logits = self.predictor(state, row.flatten(), position.flatten(), at)
        self.calls += self.predictor.calls - before
        self.nfe += 2 if options.cfg_scale > 0 else 1
        keys = None
        if options.temperature > 0:
            keys = self.keys.gather(1, masked[..., None].expand(-1, -1, 2)).flatten(0, 1)
        token, confidence = PF.token_confidence(
            logits.conditional,
            **logits.arguments(),
            guidance=options.cfg_scale,
            temperature=options.temperature,
            seed=0 if keys is None else keys,
            step=step,
            forbidden=self.predictor.forbidden(logits.conditional.shape[1], *options._forbidden),
            uncounted=options._uncounted,
            backend=options.backend,
        )
        missing = token < 0
        now = torch.where(missing.any(), step, _NEVER)
        self.failed = torch.minimum(self.failed, now)
        token = token.masked_fill(missing, options.mask_token_id)
        return token.view_as(position), confidence.view_as(position)

    def _check(self) -> None:
        failed = int(self.failed)
        if failed != _NEVER:
            raise NotANumber.at(failed)


def generate(
    model: Callable,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    eos_token_id: int = 126081,
    eot_token_id: int = 126348,
    seed: int | Sequence[int] | None = None,
    generator: Generator = None,
    sparsity: Sparsity | None = None,
    lm_head: nn.Module | str | None = "auto",
    progress: bool = False,
    backend: str = "auto",
) -> Tensor:
    """LLaDA's ``generate``, argument for argument: [B, P + gen_length], the prompts as they came, then the new tokens.

    ``confidence_eos_eot_inf=True`` does what that code does, the "repo" variant of :class:`SemiAutoregressive`, which
    explains the arguments and what differs.
    """
    sampler = SemiAutoregressive(
        model, mask_id, gen_length=gen_length, block_length=block_length, steps=steps, temperature=temperature,
        cfg_scale=cfg_scale, remasking=remasking, eos_token_id=eos_token_id, eot_token_id=eot_token_id,
        logits_eos_inf=logits_eos_inf, confidence_eos_eot_inf="repo" if confidence_eos_eot_inf else False,
        pad_token_id=0, sparsity=sparsity, lm_head=lm_head, backend=backend,
    )  # fmt: skip
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise TypeError("prompt: expected a tensor [B, P]")
    result = sampler.generate(prompt, attention_mask, seed=seed, generator=generator, progress=progress)
    return torch.cat([prompt, torch.stack(result.generated)], 1)
