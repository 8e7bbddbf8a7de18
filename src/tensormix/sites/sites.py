"""Where a model can be compressed: its blocks, and the matrices and stacks of experts inside them.

Shape letters: O out_features, I in_features, E experts. A weight is always read as (O, I), and a stack of them as
(E, O, I), however the architecture stores it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from tensormix.operators import Cost, DenseStack, Experts, Operator, SlicedBlock, StandIn
from tensormix.sites.costs import cost_of
from tensormix.sites.families import is_conv1d, is_dense, qkv_takes_turns, role_of, routers_in
from tensormix.sites.fused_experts import dense_stack, experts_per_token, is_fused, open_experts, stack_names
from tensormix.sites.locate import blocks, locate_blocks
from tensormix.sites.other_blocks import check_one_list
from tensormix.sites.seen import Seen, seen_in


@dataclass(frozen=True, eq=False)
class Site:
    """One place whose weight a method may replace.

    `kind` is "linear" (a matrix inside a block), "experts" (a stack of them, one for each expert) or "block" (a whole
    decoder block). `role` says what a matrix does (one of `ROLES`, or None for one we have no word for); `block` is
    the index of the decoder block. `module` holds the weight; of a stack that is not opened it holds the others too.
    A linear layer counts as one expert that every token visits.
    """

    name: str
    kind: str
    role: str | None
    block: int | None
    module: nn.Module
    experts_per_token: int = 1

    @property
    def weight(self) -> Tensor:  # (O, I), of experts (E, O, I): a view, nothing is copied
        if self.kind == "experts":
            return self._stack.weight.detach()
        weight = self.module.get_parameter("weight").detach()
        return weight.t() if is_conv1d(self.module) else weight

    def expert_weight(self, expert: int) -> Tensor:  # (O, I), a view
        return self.weight[expert] if self.kind == "experts" else self.weight

    @property
    def bias(self) -> Tensor | None:  # (O,), of experts (E, O)
        bias = getattr(self._stack if self.kind == "experts" else self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0] if self.kind == "experts" else 1

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of the dense weight for one token, at the experts that it visits."""
        return self.in_features * self.out_features * self.experts_per_token

    def cost(self, stored_bits: int) -> Cost:
        """Of what is dense here, without the bias: of the weight, or of all of a block, at the experts that it visits.

        `stored_bits` are those that it takes where it is stored, packed perhaps.
        """
        if self.kind == "block":
            own = cost_of(self.module)
            return own._replace(bits=stored_bits, bytes_per_token=stored_bits * own.bytes_per_token // max(own.bits, 1))
        read = stored_bits // 8 * self.experts_per_token // self.num_experts
        return Cost(self.weight.numel(), stored_bits, self.macs_per_token, read)

    @property
    def _stack(self) -> DenseStack:
        if isinstance(self.module, DenseStack):
            return self.module
        return dense_stack(self.module, self.name.rpartition(".")[2])


def find_sites(model: nn.Module) -> list[Site]:
    """Every site that is still dense: each block, followed by the linear layers and stacks of experts inside it.

    Embeddings, the head, norms and routers are never sites, nor is what text does not reach, or multiplies by hand
    (`seen_in`); what is compressed already is no longer one.

    Raises ValueError if the model has no list of blocks, or text passes several.
    """
    check_one_list(model)
    root, layers = locate_blocks(model)
    sites, seen = [], seen_in(model)
    for index, block in enumerate(layers):
        found = Seen() if seen is None else seen[index]
        if isinstance(block, StandIn) or found is None:
            continue
        no_layers = found.no_layers
        routers = routers_in(block)
        prefix = f"{root}.{index}"
        if not isinstance(block, SlicedBlock):  # without it the channels of the next block would be missed
            sites.append(Site(prefix, "block", None, index, block))
        for name, module in block.named_modules(prefix=prefix):
            inside = name[len(prefix) + 1 :]
            if is_dense(module) and inside not in no_layers and not f"{inside}.".startswith(routers):
                sites.append(Site(name, "linear", role_of(name), index, module))
            elif is_fused(module) or isinstance(module, Experts):
                sites += _stacks(name, index, module)
    return sites


def unknown_stacks(model: nn.Module) -> list[str]:
    """The stacks of matrices inside blocks that are no sites, since how they are multiplied is not known."""
    root, layers = locate_blocks(model)
    found = []
    for index, block in enumerate(layers):
        for name, part in block.named_modules(prefix=f"{root}.{index}"):
            if isinstance(part, Operator | Experts) or is_fused(part) or "conv" in type(part).__name__.lower():
                continue
            found += [f"{name}.{leaf}" for leaf, p in part._parameters.items() if p is not None and _is_stack(p)]
    return found


def _is_stack(parameter: Tensor) -> bool:
    return parameter.dim() == 3 and min(parameter.shape) > 1


def _stacks(name: str, block: int, experts: nn.Module) -> list[Site]:
    """The dense stacks of the experts `name`, whether they are opened or not."""
    if isinstance(experts, Experts):
        stacks: dict[str, nn.Module] = {
            n: stack for n, stack in experts.stacks.items() if isinstance(stack, DenseStack)
        }
        visits = experts.experts_per_token
    else:
        stacks, visits = dict.fromkeys(stack_names(experts), experts), experts_per_token(experts)
    return [Site(f"{name}.{stack}", "experts", stack, block, module, visits) for stack, module in stacks.items()]


@contextmanager
def opened(model: nn.Module, sites: Collection[Site]) -> Iterator[dict[str, nn.Module]]:
    """For each site, by name, the module that is called with its inputs; fused experts are open while this is.

    A linear layer is called with (x), a stack of experts with (x, expert) for each expert that gets tokens: forward
    pre-hooks see them. Nothing may be installed meanwhile.
    """
    fused: dict[str, nn.Module] = {}
    try:
        for name in {site.name.rpartition(".")[0] for site in sites if site.kind == "experts"}:
            experts = model.get_submodule(name)
            if is_fused(experts):
                open_experts(model, name)
                fused[name] = experts
        yield {site.name: model.get_submodule(site.name) for site in sites}
    finally:
        for name, experts in fused.items():
            model.set_submodule(name, experts)


def takes_turns(model: nn.Module, site: Site) -> bool:
    """Whether the rows of a fused qkv take turns, head by head, instead of being all of q, then of k, then of v.

    Raises ValueError if the layout is not known.
    """
    return qkv_takes_turns(blocks(model)[site.block or 0], site.name)
