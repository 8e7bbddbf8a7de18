"""Lists of blocks that text passes beside those that are compressed, seen on a twin."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensormix.sites.families import is_dense
from tensormix.sites.twin import Twin, twin_of


def other_blocks(model: nn.Module) -> list[str]:
    """The names of those lists; none of a model without a twin, or whose twin does not run."""
    twin = twin_of(model)
    if twin is None:
        return []
    if not hasattr(twin, "other_blocks"):
        vars(twin)["other_blocks"] = _look(twin)
    return vars(twin)["other_blocks"]


def check_one_list(model: Any) -> None:
    """Raise ValueError, naming them, if text passes several lists of blocks: what one does shows in the others.

    An encoder beside a decoder may be there. It stays as it is.
    """
    others = other_blocks(model)
    config: Any = getattr(model, "config", None)
    if others and not getattr(config, "is_encoder_decoder", False):
        twin: Any = twin_of(model)
        raise ValueError(
            f"text passes several lists of blocks of a {type(model).__name__}: {twin.root} and {', '.join(others)}; "
            "tensormix needs a model that keeps all blocks in one list, each with its attention and its MLP"
        )


def _look(twin: Twin) -> list[str]:
    lists = {name: part for name, part in twin.model.named_modules() if isinstance(part, nn.ModuleList)}
    reached: dict[str, None] = {}
    handles = []
    for name, members in lists.items():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if inside or name == twin.root or twin.root.startswith(f"{name}."):
            continue
        for member in members:
            if not is_dense(member) and any(is_dense(part) for part in member.modules()):
                handles.append(member.register_forward_hook(lambda *_, name=name: reached.setdefault(name)))
    try:
        if handles:
            twin.run()
    except Exception:  # whatever a model may not like about a few tokens, the rest of it was not seen then
        pass
    finally:
        for handle in handles:
            handle.remove()
    return list(reached)
