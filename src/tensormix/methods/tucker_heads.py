"""The heads of an attention in one Tucker tensor."""

from __future__ import annotations

from typing import Literal

from tensormix.methods.base import Heads
from tensormix.methods.neurons import check_together
from tensormix.methods.tucker import Shapes, SharedTucker
from tensormix.operators.tucker_heads import Part

_ROLES = ("q", "k", "v", "o")


class TuckerAttention(SharedTucker):
    """q, k, v and o of one attention as one tensor (hidden size, heads, channels of a head, part), in Tucker form.

    The factors of the hidden size, of the channels and of the parts are shared by all heads, and each head keeps a core
    of its own. They are found by HOOI, which never holds less than the truncated HOSVD. Where keys and values have
    fewer heads, they share the factors with q and o, but their parts and cores are their own.

    `orientation: published` cuts the rows of q, k, v as the released code does: the slices of a "head" are then
    slices of the hidden size that is read, and the channels of all heads lie along the other axis.
    """

    source = "TensorLLM, arXiv 2501.15674 (its Tucker-4 form); ranks by energy and grouped queries are ours"
    summary = "q, k, v and o of all heads share Tucker factors, and each head has a small core."
    roles = _ROLES

    name: Literal["tucker_heads"] = "tucker_heads"
    orientation: Literal["heads", "published"] = "heads"

    def layout(self, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
        parts, D, C = parts_of_heads(self.name, shapes, heads)
        if self.orientation == "heads":
            return parts, D, C
        assert heads is not None
        H, G, _ = heads
        if G != H or shapes["q"][0] != D:
            raise ValueError(
                f"{self.name}: the published orientation needs as many heads of keys as of queries, as wide as the "
                f"stream, but there are {H} heads of queries and {G} of keys, of {C} channels, and {D} features; "
                "take orientation: heads"
            )
        return {role: Part(H, False) for role in _ROLES}, D, C


def parts_of_heads(method: str, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
    """q, k, v and o of an attention by role, with the hidden size and the channels of a head.

    Raises ValueError unless all four are there.
    """
    check_together(method, shapes, _ROLES)
    assert heads is not None
    H, G, C = heads
    return {role: Part(G if role in "kv" else H, role != "o") for role in _ROLES}, shapes["q"][1], C
