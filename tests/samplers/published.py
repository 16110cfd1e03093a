"""The published algorithms of masked-diffusion sampling, written down once more: plain loops in float64, one sample."""

import torch

NOTHING = -float("inf")


def choose(logits, temperature=0.0, uniform=None):
    """(token, softmax) of each row; noise by the published formula, exp(l) / (-log u)^T."""
    noised = logits if temperature == 0 else logits.exp() / (-uniform.log()) ** temperature
    return noised.argmax(-1), logits.softmax(-1)


def logits_of(model, x, prompt, cfg_scale, mask):
    logits = model(x[None]).logits[0].clone()
    if cfg_scale > 0:
        blind = x.clone()
        blind[:prompt] = mask
        other = model(blind[None]).logits[0]
        guided = other + (cfg_scale + 1) * (logits - other)
        logits = torch.where(logits == NOTHING, logits, guided)
    return logits


@torch.no_grad()
def llada(model, prompt, *, mask, gen_length, block_length, steps, cfg_scale=0.0, without_eos=None, unsure=()):
    """LLaDA at temperature 0. ``without_eos``: a token whose logits become -inf; ``unsure``: -inf after the choice."""
    x = torch.cat([prompt, torch.full((gen_length,), mask)])
    start, blocks = len(prompt), gen_length // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        masks = int((x[end - block_length : end] == mask).sum())
        per_block = steps // blocks
        for i in range(per_block):
            count = masks // per_block + (i < masks % per_block)
            logits = logits_of(model, x, start, cfg_scale, mask)
            if without_eos is not None:
                logits[:, without_eos] = NOTHING
            token, _ = choose(logits)
            logits[:, list(unsure)] = NOTHING
            p = logits.softmax(-1)
            confidence = torch.full(x.shape, NOTHING, dtype=torch.float64)
            for j in range(end):
                if x[j] == mask:
                    confidence[j] = p[j, token[j]]
            kept = confidence.topk(count).indices
            x[kept] = token[kept]
    return x


def eos_confidence(logits, start, window, eos):
    found = []
    for j in reversed(range(start, logits.shape[0])):
        if len(found) < window and logits[j].argmax() == eos:
            found.append(logits[j].softmax(-1)[eos].item())
    return sum(found) / window


@torch.no_grad()
def daedal(model, prompt, *, mask, eos, initial=64, longest=2048, block=32, high=0.9, low=0.1, factor=8,
           eos_enough=0.5, eos_no_growth=0.9, window=32, cfg_scale=0.0):  # fmt: skip
    """DAEDAL at temperature 0. Returns (sequence, evaluations)."""
    start = len(prompt)
    x, evaluations = torch.cat([prompt, torch.full((initial,), mask)]), 0
    while True:
        evaluations += 1
        logits = model(x[None]).logits[0]
        length = len(x) - start
        if eos_confidence(logits, start, window, eos) >= eos_enough or length >= longest:
            break
        x = torch.cat([x, torch.full((min(factor, longest - length),), mask)])
    x = torch.cat([x, torch.full((min(window // 2, longest - length),), eos)])
    at = start
    while at < len(x):
        evaluations += 2 if cfg_scale > 0 else 1
        logits = logits_of(model, x, start, cfg_scale, mask)
        p = logits.softmax(-1)
        token = logits.argmax(-1)
        end = min(at + block, len(x))
        places = [j for j in range(at, end) if x[j] == mask]
        fill = {j: int(token[j]) for j in places if token[j] != mask and p[j, token[j]] > high}
        if not fill and places:
            possible = [j for j in places if token[j] != mask]
            if possible:
                best = max(possible, key=lambda j: (p[j, token[j]].item(), -j))
                fill = {best: int(token[best])}
            else:
                others = logits.clone()
                others[:, mask] = NOTHING
                q = others.softmax(-1)
                best = max(places, key=lambda j: (q[j].max().item(), -j))
                fill = {best: int(q[best].argmax())}
        grow = None
        unsure = [j for j in places if j not in fill and p[j, token[j]] < low]
        if unsure and len(x) - start < longest and eos_confidence(logits, start, window, eos) < eos_no_growth:
            grow = min(unsure, key=lambda j: (p[j, token[j]].item(), j))
        for j, value in fill.items():
            x[j] = value
        if grow is not None:
            x = torch.cat([x[:grow], torch.full((factor,), mask), x[grow + 1 :]])[: start + longest]
        while at < len(x) and not (x[at : min(at + block, len(x))] == mask).any():
            at += block
    return x, evaluations
