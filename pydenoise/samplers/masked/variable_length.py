"""DAEDAL: generation whose length follows from the model's own end-of-text predictions, batched."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, noise_keys
from pydenoise.samplers.masked.options import NotANumber, check_int, check_number
from pydenoise.samplers.masked.predictor import Batch, Logits, Predictor, Sparsity, Step
from pydenoise.samplers.masked.prompts import Prompt, padded, prompts_of
from pydenoise.samplers.masked.result import Generation, StepInfo


@dataclass
class _Text:
    """One sample, on the CPU: its prompt, its generated region, and the begin of the block that is being filled."""

    tokens: Tensor  # int64 [P + G]
    prompt: int
    at: int = 0
    nfe: int = 0
    done: bool = False

    @property
    def size(self) -> int:
        """Length of the generated region."""
        return self.tokens.shape[0] - self.prompt

    @property
    def region(self) -> Tensor:
        return self.tokens[self.prompt :]


@dataclass(frozen=True)
class _Prediction:
    """At every place of a generated region, on the CPU: the token that would be put there and its confidence (only in
    the current block, where it is sampled), the most likely token, and the probability of the end of text."""

    token: Tensor
    confidence: Tensor
    likeliest: Tensor
    eos: Tensor


class VariableLength:
    """Generation that finds its own length, as in DAEDAL.

    First the region of masks grows until the model predicts the end of the text at its end surely enough; then, block
    after block, all tokens above ``high_confidence`` are filled in at once (at least one a step), and while the text
    does not end surely enough, the masked position of the block that is below ``low_confidence`` and lowest becomes
    ``expansion`` masks. Samples of a batch grow and finish by themselves; each gets the tokens that it gets alone.

    Args:
        model, mask_token_id, temperature, cfg_scale, pad_token_id, sparsity, lm_head, backend: as in
            :class:`SemiAutoregressive`. ``begin_step`` gets step 0 of 1 while the length is looked for; then steps
            count from 0, and ``num_steps`` is ``expected_steps``.
        eos_token_id: the end of text.
        initial_length, max_length: of the generated region.
        block_length: of the blocks.
        high_confidence, low_confidence: thresholds of confidences.
        expansion: masks that a growing sample gets at a time, and that a position of low confidence becomes.
        eos_threshold: of the end's confidence, for the length at the beginning.
        expand_eos_threshold: no position is expanded where the end's confidence has reached it.
        eos_window: the end's confidence is the sum, divided by this number, of the probabilities of the end of text at
            the last so many places where it is the most likely token.
        expected_steps: told to ``sparsity``; ``None``: the masks that are there when filling begins.
        pad_to_multiple: batches are padded to multiples of it, so that compiled models see few lengths.

    The mask is filled in only if the model predicts another token there; where it predicts the mask at all candidates,
    the best other token is taken, as in the published code.

    Source: Li et al., Beyond Fixed: Training-Free Variable-Length Denoising for Diffusion Large Language Models (2025),
    https://arxiv.org/abs/2508.00819, and its code.
    """

    def __init__(
        self,
        model: Callable,
        mask_token_id: int,
        eos_token_id: int,
        *,
        initial_length: int = 64,
        max_length: int = 2048,
        block_length: int = 32,
        high_confidence: float = 0.9,
        low_confidence: float = 0.1,
        expansion: int = 8,
        eos_threshold: float = 0.5,
        expand_eos_threshold: float = 0.9,
        eos_window: int = 32,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        pad_token_id: int | None = None,
        pad_to_multiple: int = 1,
        expected_steps: int | None = None,
        sparsity: Sparsity | None = None,
        lm_head: nn.Module | str | None = "auto",
        backend: str = "auto",
    ):
        self.mask_token_id = check_int("mask_token_id", mask_token_id, 0)
        self.eos_token_id = check_int("eos_token_id", eos_token_id, 0)
        if eos_token_id == mask_token_id:
            raise ValueError(f"eos_token_id: expected another token than the mask {mask_token_id}")
        self.initial_length = check_int("initial_length", initial_length, 1)
        self.max_length = check_int("max_length", max_length, 1)
        if self.initial_length > self.max_length:
            raise ValueError(f"initial_length: expected at most max_length {max_length}, got {initial_length}")
        self.block_length = check_int("block_length", block_length, 1)
        self.high_confidence = check_number("high_confidence", high_confidence, 0, 1)
        self.low_confidence = check_number("low_confidence", low_confidence, 0, 1)
        self.expansion = check_int("expansion", expansion, 1)
        self.eos_threshold = check_number("eos_threshold", eos_threshold, 0, 1)
        self.expand_eos_threshold = check_number("expand_eos_threshold", expand_eos_threshold, 0, 1)
        self.eos_window = check_int("eos_window", eos_window, 1)
        self.temperature = check_number("temperature", temperature, 0)
        self.cfg_scale = check_number("cfg_scale", cfg_scale, 0)
        self.pad_token_id = self.eos_token_id if pad_token_id is None else check_int("pad_token_id", pad_token_id, 0)
        self.pad_to_multiple = check_int("pad_to_multiple", pad_to_multiple, 1)
        self.expected_steps = None if expected_steps is None else check_int("expected_steps", expected_steps, 1)
        self.backend = backend
        self._predictor = Predictor(model, self.mask_token_id, self.cfg_scale, sparsity, lm_head)

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
        """Continue every prompt; arguments and errors as in :meth:`SemiAutoregressive.generate`.

        ``Generation.generated`` holds texts of different lengths. Every step waits for the device once: the lengths
        depend on what is predicted.
        """
        prompts = prompts_of(input_ids, attention_mask, self.mask_token_id, device)
        run = _Run(self, prompts)
        if self.temperature > 0:
            run.keys = noise_keys(seed, generator, len(prompts), self.max_length, run.device)
        states = [run.sequences()] if return_trajectory else None
        with Progress(progress, "generating") as bar:
            for step in run.steps():
                bar.advance()
                if states is not None:
                    states.append(run.sequences())
                if callback is not None:
                    callback(StepInfo(step, None, run.sequences(), max(text.nfe for text in run.texts)))
        return Generation(
            run.sequences(), tuple(t.prompt for t in run.texts), tuple(t.tokens.shape[0] for t in run.texts),
            tuple(t.nfe for t in run.texts), run.calls, None if states is None else tuple(states),
        )  # fmt: skip

    # ------------------------------------------------------------------------------ decisions, one sample at a time

    def eos_confidence(self, prediction: _Prediction) -> float:
        """How surely a region ends with the end of text, 0 to 1."""
        found = (prediction.likeliest == self.eos_token_id).nonzero()[:, 0]
        return prediction.eos[found[-self.eos_window :]].double().sum().item() / self.eos_window

    def grow(self, text: _Text, prediction: _Prediction) -> None:
        """Append masks while the end is not sure, or finish the search for the length."""
        more = min(self.expansion, self.max_length - text.size)
        if self.eos_confidence(prediction) < self.eos_threshold and more > 0:
            text.tokens = torch.cat([text.tokens, text.tokens.new_full((more,), self.mask_token_id)])
            return
        ends = min(self.eos_window // 2, self.max_length - text.size)
        text.tokens = torch.cat([text.tokens, text.tokens.new_full((ends,), self.eos_token_id)])
        text.done = True

    def block(self, text: _Text) -> slice:
        """The current block, in places of the region."""
        return slice(text.at, min(text.at + self.block_length, text.size))

    def sure(self, text: _Text, prediction: _Prediction) -> Tensor | None:
        """Places to fill in; ``None`` where the model predicts the mask at all masked places of the block."""
        block = self.block(text)
        token, confidence = prediction.token[block], prediction.confidence[block]
        masked = text.region[block] == self.mask_token_id
        possible = masked & (token != self.mask_token_id)
        places = (possible & (confidence > self.high_confidence)).nonzero()[:, 0]
        if not len(places):
            if not possible.any():
                return None
            places = confidence.masked_fill(~possible, -1.0).argmax()[None]
        return places + block.start

    def unsure(self, text: _Text, prediction: _Prediction, filled: Tensor) -> int | None:
        """The place to expand, if there is one."""
        if text.size >= self.max_length or self.eos_confidence(prediction) >= self.expand_eos_threshold:
            return None
        block = self.block(text)
        candidate = text.region[block] == self.mask_token_id
        candidate[filled - block.start] = False
        confidence = prediction.confidence[block]
        candidate &= confidence < self.low_confidence
        if not candidate.any():
            return None
        return int(confidence.masked_fill(~candidate, 2.0).argmin()) + block.start

    def advance(self, text: _Text, filled: Tensor, tokens: Tensor, expanded: int | None) -> None:
        """Fill in, expand (what passes ``max_length`` is lost), and move to the first block with a mask."""
        text.tokens[filled + text.prompt] = tokens
        if expanded is not None:
            at = text.prompt + expanded
            masks = text.tokens.new_full((self.expansion,), self.mask_token_id)
            text.tokens = torch.cat([text.tokens[:at], masks, text.tokens[at + 1 :]])
            text.tokens = text.tokens[: text.prompt + self.max_length]
        self.skip_filled(text)

    def skip_filled(self, text: _Text) -> None:
        while text.at < text.size and not (text.region[self.block(text)] == self.mask_token_id).any():
            text.at += self.block_length
        text.done = text.at >= text.size


class _Run:
    """One generation: the texts, and the calls of the model on those that need one."""

    def __init__(self, options: VariableLength, prompts: list[Tensor]):
        self.options, self.predictor = options, options._predictor
        self.device = prompts[0].device
        masks = torch.full((options.initial_length,), options.mask_token_id)
        self.texts = [_Text(torch.cat([prompt.cpu(), masks]), prompt.shape[0]) for prompt in prompts]
        self.keys: Tensor | None = None
        self.calls = 0

    def sequences(self) -> Tensor:
        """The state, [B, L] on the device."""
        return padded([text.tokens for text in self.texts], self.options.pad_token_id).to(self.device)

    def steps(self):
        """Run all steps, yielding their number after each."""
        step = -1
        while any(not text.done for text in self.texts):
            step += 1
            for view in self._predict(step, Step(0, 1, 0), guided=False):
                self.options.grow(view.text, view.prediction)
            yield step
        masks = 0
        for text in self.texts:
            text.done = False
            self.options.skip_filled(text)
            masks = max(masks, int((text.region == self.options.mask_token_id).sum()))
        filling = 0
        while any(not text.done for text in self.texts):
            step += 1
            at = Step(filling, max(self.options.expected_steps or masks, filling + 1), 0)
            self._fill(step, at)
            filling += 1
            yield step

    def _fill(self, step: int, at: Step) -> None:
        for view in self._predict(step, at, guided=True):
            text, prediction = view.text, view.prediction
            filled = self.options.sure(text, prediction)
            if filled is None:
                filled, tokens = self._best_but_the_mask(view)
            else:
                tokens = prediction.token[filled]
            expanded = self.options.unsure(text, prediction, filled)
            self.options.advance(text, filled, tokens, expanded)

    # -------------------------------------------------------------------------------------------- calls of the model

    def _predict(self, step: int, at: Step, guided: bool) -> "list[_View]":
        """A prediction for every text that is not done. One call of the model."""
        options = self.options
        called = [t for t in self.texts if options._predictor.sparsity is not None or not t.done]
        tokens = padded([t.tokens for t in called], options.pad_token_id, options.pad_to_multiple).to(self.device)
        before = self.predictor.calls
        places = [torch.arange(t.prompt, t.tokens.shape[0]) for t in called]
        row = torch.repeat_interleave(torch.arange(len(called)), torch.tensor([t.size for t in called]))
        at = Step(at.step, at.num_steps, tokens.shape[1] - min(t.prompt for t in called))
        state = self._batch(called, tokens, guided)
        logits = self.predictor(state, row.to(self.device), torch.cat(places).to(self.device), at, guided)
        self.calls += self.predictor.calls - before
        for text in called:
            text.nfe += 2 if guided and options.cfg_scale > 0 else 1
        predictions = self._read(called, logits, step, guided)
        views = zip(called, predictions, self._offsets(called), strict=True)
        return [_View(text, prediction, logits, first) for text, prediction, first in views if not text.done]

    @staticmethod
    def _offsets(texts: list[_Text]) -> list[int]:
        """Where each text's places begin among all of them."""
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + text.size)
        return offsets[:-1]

    def _batch(self, texts: list[_Text], tokens: Tensor, guided: bool) -> Batch:
        lengths = [t.tokens.shape[0] for t in texts]
        full = set(lengths) == {tokens.shape[1]}
        prompt = None
        if guided and self.options.cfg_scale > 0:
            ends = torch.tensor([t.prompt for t in texts]).to(self.device)
            prompt = torch.arange(tokens.shape[1], device=self.device) < ends[:, None]
        return Batch(tokens, prompt, None if full else torch.tensor(lengths).to(self.device))

    def _read(self, texts: list[_Text], logits: Logits, step: int, guided: bool) -> list[_Prediction]:
        """Tokens and confidences of all places, brought to the CPU."""
        common = {"guidance": self.options.cfg_scale if guided else 0.0, "backend": self.options.backend}
        eos = self.options.eos_token_id
        token, confidence, probability = PF.token_confidence(
            logits.conditional, **logits.arguments(), **common, eos_token_id=eos
        )
        likeliest = token
        if guided and self.options.temperature > 0:
            token, confidence = token.clone(), confidence.clone()
            chosen, keys = self._sampled_places(texts)
            token[chosen], confidence[chosen] = PF.token_confidence(
                logits.conditional, **logits.arguments(chosen), **common, temperature=self.options.temperature,
                seed=keys, step=step,
            )  # fmt: skip
        results = [t.cpu() for t in (token, confidence, likeliest, probability)]
        if (results[0] < 0).any() or (results[2] < 0).any():
            raise NotANumber.at(step)
        sizes = [text.size for text in texts]
        return [_Prediction(*parts) for parts in zip(*(r.split(sizes) for r in results), strict=True)]

    def _sampled_places(self, texts: list[_Text]) -> tuple[Tensor, Tensor]:
        """The masked places of the current blocks among all places, and the keys of their noise."""
        chosen, keys = [], []
        numbers = {id(text): b for b, text in enumerate(self.texts)}
        for text, offset in zip(texts, self._offsets(texts), strict=True):
            if text.done:
                continue
            block = self.options.block(text)
            masked = (text.region[block] == self.options.mask_token_id).nonzero()[:, 0] + block.start
            chosen.append(masked + offset)
            keys.append(self.keys[numbers[id(text)], masked.to(self.device)])
        return torch.cat(chosen).to(self.device), torch.cat(keys)

    def _best_but_the_mask(self, view: "_View") -> tuple[Tensor, Tensor]:
        """(place [1], token [1]): the surest masked place of the block, were the mask impossible."""
        options, text = self.options, view.text
        block = options.block(text)
        masked = (text.region[block] == options.mask_token_id).nonzero()[:, 0] + block.start
        chosen = (masked + view.first).to(self.device)
        token, confidence = PF.token_confidence(
            view.logits.conditional, **view.logits.arguments(chosen), guidance=options.cfg_scale,
            forbidden=(options.mask_token_id,), backend=options.backend,
        )  # fmt: skip
        best = int(confidence.argmax())
        return masked[best : best + 1], token[best : best + 1].cpu()


@dataclass(frozen=True)
class _View:
    """What one call of the model says of a text; its places are those from ``first`` on in ``logits``."""

    text: _Text
    prediction: _Prediction
    logits: Logits
    first: int
