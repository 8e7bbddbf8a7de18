"""A decoder block whose residual stream is narrower, and the norm that goes with it.

Shape letters: ... leading batch axes, S width of the sliced residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SlicedNorm(nn.Module):
    """x / sqrt(sum(x^2) / full + eps): the root mean square norm of a stream of `full` channels without its scale.

    Turning the channels does not change it, and neither does leaving out those that are zero. The zero-size buffer
    `weight` stops a loader that does not know it.
    """

    def __init__(self, full: int, eps: float) -> None:
        super().__init__()
        self.full, self.eps = full, eps
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:  # (..., S)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.full + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"full={self.full}, eps={self.eps}"


class SlicedBlock(nn.Module):
    """h <- h S_1 + attention(norm(h)), then h <- h S_2 + mlp(norm(h)): every half has channels of its own.

    S_1 and S_2 (the shortcuts) turn the residual stream from the channels of one half into those of the next.
    """

    is_replacement = True  # as of an operator

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        norms: tuple[SlicedNorm, SlicedNorm],
        shortcuts: tuple[nn.Linear, ...],
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.post_attention_layernorm = norms
        self.attention_shortcut, self.mlp_shortcut = shortcuts

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # (B, T, S)
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))
