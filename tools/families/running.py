"""Compressed models at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from configs import Tiny
from shown import Same, SameSeen
from torch import Tensor, nn
from trying import HALF, NotTried, Refused, asked, batches, dense, error, logits, plan

from tensormix.sites import blocks


def written(model: Any, tiny: Tiny, cache: bool, seed: int = 0) -> Tensor:  # (T, V)
    """The logits of four tokens that it writes."""
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cache}
    out = model.generate(
        tiny.tokens(1, 8, seed), pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.cat(out.logits)


def gap_of_cache(model: Any, tiny: Tiny, seed: int = 0) -> float:
    """How far what is written with a cache is from what is written without."""
    return error(written(model, tiny, True, seed), written(model, tiny, False, seed))


def generate_densely(tiny: Tiny) -> None:
    # Several texts: attention that chooses few tokens may choose others after the last bit.
    off = dense(lambda: max(gap_of_cache(tiny.make(), tiny, seed) for seed in range(5)))
    if not off < 1e-3:
        raise NotTried(f"what the dense model writes with a cache is off by {off:.1e}")


def generates(tiny: Tiny) -> str:
    """A compressed model writes the same with a cache and without."""
    generate_densely(tiny)
    model = tiny.make()
    asked(tiny, model, plan(method=HALF))
    off = gap_of_cache(model, tiny)
    assert off < 1e-3, f"with a cache it is off by {off:.1e}"
    return f"off by {off:.0e}"


def dropped_blocks(tiny: Tiny) -> str:
    """Any block and any two neighbours can be left out, and the model writes the same with a cache and without."""
    generate_densely(tiny)
    number, refusals, done = len(blocks(tiny.make())), [], 0
    for chosen in [f"{i}" for i in range(number)] + [f"{i},{i + 1}" for i in range(number - 1)]:
        model = tiny.make()
        try:
            asked(tiny, model, plan(blocks=chosen, method={"name": "drop_blocks"}))
        except Refused as refusal:
            refusals.append(str(refusal))
            continue
        off = gap_of_cache(model, tiny)
        assert off < 1e-3, f"without {chosen} it is off by {off:.1e} with a cache"
        done += 1
    if not done:
        raise Refused(refusals[0])
    return f"{done} of {done + len(refusals)}" + (f", else: {refusals[0]}" if refusals else "")


def halves(dtype: torch.dtype) -> Callable[[Tiny], str]:
    def feature(tiny: Tiny) -> str:
        model = tiny.make(dtype)
        before = dense(lambda: finite(logits(model, tiny.tokens())))
        dense(lambda: logits(model, tiny.tokens(), use_cache=False))  # as in calibration
        asked(tiny, model, plan(method=SameSeen()), batches(tiny))
        rough = error(before, logits(tiny.make(), tiny.tokens()))  # experts of a token change with the last bit
        off = error(logits(model, tiny.tokens()), before)
        assert off < max(0.1, 2 * rough), f"off by {off:.2f}, the dense model by {rough:.2f}"
        model = tiny.make(dtype)
        asked(tiny, model, plan(method={"name": "svd_llm", "keep": 0.9}), batches(tiny))
        finite(logits(model, tiny.tokens()))
        return f"off by {off:.0e}"

    return feature


def finite(values: Tensor) -> Tensor:
    assert torch.isfinite(values).all(), "not finite"
    return values


def padded(tiny: Tiny) -> str:
    """Rows with padding and a mask give what they give without, as in the dense model."""
    x = tiny.tokens(2, 12)
    x[1, :5] = 0
    mask = torch.ones_like(x)
    mask[1, :5] = 0

    def gap(model: Any) -> float:
        return error(logits(model, x, attention_mask=mask)[0], logits(model, x[:1])[0])

    model = tiny.make()
    rough = dense(lambda: gap(model))
    before = dense(lambda: logits(model, x, attention_mask=mask))
    asked(tiny, model, plan(method=Same()))
    off = error(logits(model, x, attention_mask=mask)[mask.bool()], before[mask.bool()])
    assert off < 1e-4, f"masked rows are off by {off:.1e}"
    after = gap(model)
    assert after <= max(1e-4, 2 * rough), f"a row beside a padded one is off by {after:.1e}, dense {rough:.1e}"
    return f"off by {off:.0e}"


def compiled(tiny: Tiny) -> str:
    """A compiled model gives what it gives without."""

    def gap(model: Any) -> float:
        torch._dynamo.reset()
        return error(
            logits(torch.compile(model, backend="eager"), tiny.tokens(), use_cache=False), logits(model, tiny.tokens())
        )

    rough = dense(lambda: gap(tiny.make()))
    if not rough < 1e-4:
        raise NotTried(f"the dense model, compiled, is off by {rough:.1e}")
    model = tiny.make()
    asked(tiny, model, plan(method={"name": "mixt", "num_branches": 2}))
    off = gap(model)
    torch._dynamo.reset()
    assert off < 1e-4, f"off by {off:.1e}"
    return f"off by {off:.0e}"


def checkpointed(tiny: Tiny) -> str:
    """Gradients with gradient checkpointing are those without."""
    dense(lambda: slope(tiny.make(), tiny, True))
    found = []
    for recompute in (False, True):
        model = tiny.make()
        asked(tiny, model, plan(method=HALF))
        found.append(slope(model, tiny, recompute))
    off = error(found[1], found[0])
    assert off < 1e-4, f"the gradients are off by {off:.1e}"
    return f"off by {off:.0e}"


def slope(model: Any, tiny: Tiny, recompute: bool) -> Tensor:
    if recompute:
        model.gradient_checkpointing_enable()
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    torch.manual_seed(0)
    model(input_ids=tiny.tokens(), use_cache=False).logits.float().square().mean().backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])


def trained(tiny: Tiny) -> str:
    """Two steps of training lower the loss or leave it finite, and only what can learn moves."""
    dense(lambda: logits_with_gradient(tiny.make(), tiny).float().square().mean().backward())
    model = tiny.make()
    asked(tiny, model, plan(method=HALF))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(2):
        out = logits_with_gradient(model, tiny)
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1).float(), tiny.tokens()[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert all(torch.isfinite(p).all() for p in model.parameters()) and losses[1] < losses[0] + 0.1, f"losses {losses}"
    return f"{losses[0]:.3f} to {losses[1]:.3f}"


def logits_with_gradient(model: Any, tiny: Tiny) -> Tensor:
    return model(input_ids=tiny.tokens(), use_cache=False).logits
