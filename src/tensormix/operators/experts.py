"""The experts of one block: a matrix for each, multiplied all in one grouped product or one expert at a time.

Shape letters: ... leading batch axes, N tokens, K experts per token, S rows (tokens at one expert each, sorted by it),
E experts, D width of the block, I in_features, O out_features.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import Operator, StructuredLinear
from tensormix.operators.cost import Cost
from tensormix.operators.groups import Groups
from tensormix.operators.shared_calls import has_hooks


class StackedLinear(Operator):
    """y = x @ W_e.T + b_e for the expert e that is asked for; every W_e is (O, I).

    It is called as a module with (x, expert): a forward pre-hook gets the tokens of each expert. Where nobody watches,
    it may be called once with the rows of all experts and their `Groups`. Its MACs and bytes per token are those of a
    token at ONE expert, and a token costs them times the experts that it visits.
    """

    bias: nn.Parameter | None
    has_groups: ClassVar[bool] = True

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        if min(num_experts, in_features, out_features) < 1:
            raise ValueError(
                f"{type(self).__name__}: num_experts, in_features and out_features must be at least 1, "
                f"got {num_experts}, {in_features}, {out_features}"
            )
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, expert: int | Groups) -> Tensor:  # (..., I) -> (..., O)
        if isinstance(expert, Groups):
            y = self.multiply_groups(x, expert)
            return y if self.bias is None else y + self.bias[expert.experts]
        y = self.multiply(x, expert)
        return y if self.bias is None else y + self.bias[expert]

    @abstractmethod
    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        """x @ W_e.T"""

    def multiply_groups(self, x: Tensor, groups: Groups) -> Tensor:  # (S, I) -> (S, O)
        """x[s] @ W_e.T for the expert e of each row. Only if `has_groups`."""
        raise NotImplementedError(f"{type(self).__name__} multiplies one expert at a time")

    def gains_from_groups(self, x: Tensor, num_rows: int) -> bool:
        """Whether outside of a graph `multiply_groups` of so many rows is the better way, on the device of `x`.

        Measured on a CPU: a call costs more than a few small products, and with more than 1024 rows of float32 one
        expert at a time was faster. But the gradient of one expert is as large as the whole stack, and an offloaded
        stack (accelerate) is brought anew for each expert.
        """
        dear = torch.is_grad_enabled() or "_hf_hook" in vars(self)
        most = 1024 if x.element_size() >= 4 else num_rows
        return x.device.type != "cpu" or dear or self.num_experts <= num_rows <= most

    @abstractmethod
    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        """W_e itself, differentiable."""

    def to_dense(self) -> Tensor:  # (E, O, I)
        """Every W_e. It holds as much as the dense experts: `expert_dense` needs the room of one."""
        return torch.stack([self.expert_dense(expert) for expert in range(self.num_experts)])

    @property
    def cost(self) -> Cost:
        whole = super().cost
        return whole._replace(bytes_per_token=whole.bytes_per_token // self.num_experts)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        return (self.num_experts, self.out_features)


class DenseStack(StackedLinear):
    """All W_e in one parameter `stack`: (E, O, I), or (E, I, O) if `transposed`.

    Two layouts, so that the parameter of a fused module is kept as it is: contiguous, and not copied.
    """

    is_replacement = False

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, transposed: bool = False) -> None:
        super().__init__(num_experts, in_features, out_features)
        self.transposed = transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.stack = nn.Parameter(torch.empty(num_experts, *shape))

    @classmethod
    def around(cls, stack: nn.Parameter, *, transposed: bool = False) -> DenseStack:  # (E, O, I) or (E, I, O)
        """The stack that holds this very parameter."""
        num_experts, rows, columns = stack.shape
        I, O = (rows, columns) if transposed else (columns, rows)
        with torch.device("meta"):
            dense = cls(num_experts, I, O, transposed=transposed)
        dense.stack = stack
        return dense

    @property
    def weight(self) -> Tensor:  # (E, O, I), a view
        return self.stack.transpose(1, 2) if self.transposed else self.stack

    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(x, self.weight[expert])

    def multiply_groups(self, x: Tensor, groups: Groups) -> Tensor:  # (S, I) -> (S, O)
        return groups.multiply(x, self.weight.transpose(1, 2))

    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        return self.weight[expert]

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "transposed": self.transposed,
        }

    @property
    def macs_per_token(self) -> int:
        return self.in_features * self.out_features


class ExpertStack(StackedLinear):
    """One structured operator for each expert, of the same shape: `expert_0`, `expert_1`, ...

    Args:
        each: the operator of the first expert, of which the others start as copies; or those of all experts, which may
            differ in rank, or in kind.

    Raises:
        ValueError: an operator replaces no matrix, or another one than the first, or there are not `num_experts`.
    """

    def __init__(self, *, each: StructuredLinear | Sequence[StructuredLinear], num_experts: int) -> None:
        experts: list[Any] = list(each) if isinstance(each, Sequence) else [each]
        for number, expert in enumerate(experts):
            if not isinstance(expert, StructuredLinear):
                wanted = "each must be the operator of one expert, such as LowRank"
                raise ValueError(f"ExpertStack: {wanted}, not a {type(expert).__name__}")
            if (expert.in_features, expert.out_features) != (experts[0].in_features, experts[0].out_features):
                raise ValueError(f"ExpertStack: expert {number} is {expert.spec}, but expert 0 is {experts[0].spec}")
        if isinstance(each, Sequence) and len(experts) != max(num_experts, 1):
            raise ValueError(f"ExpertStack: needs the operator of each of {num_experts} experts, got {len(experts)}")
        super().__init__(num_experts, experts[0].in_features, experts[0].out_features)
        for expert in range(num_experts):
            self.add_module(f"expert_{expert}", experts[expert] if expert < len(experts) else copy.deepcopy(experts[0]))

    has_groups = False

    @classmethod
    def from_experts(cls, experts: Sequence[StructuredLinear]) -> ExpertStack:
        """The stack of these very operators. Their biases become the rows of its bias, zero where one has none.

        Raises:
            ValueError: there are none, or they differ in shape.
        """
        if not experts:
            raise ValueError("ExpertStack: needs the operator of one or more experts, got none")
        bias = biases_of(experts)
        for expert in experts:
            expert.bias = None
        stack = cls(each=list(experts), num_experts=len(experts))
        stack.bias = bias
        return stack

    def expert(self, expert: int) -> StructuredLinear:
        return cast(StructuredLinear, self.get_submodule(f"expert_{expert}"))

    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        return self.expert(expert)(x)

    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        return self.expert(expert).to_dense()

    @property
    def sizes(self) -> dict[str, Any]:
        specs = [self.expert(expert).spec for expert in range(self.num_experts)]
        each = specs[0] if all(spec == specs[0] for spec in specs) else specs
        return {"each": each, "num_experts": self.num_experts}

    @property
    def macs_per_token(self) -> int:
        """Of experts that differ the mean, rounded up: which one a token visits is not known."""
        return ceil(sum(self.expert(expert).macs_per_token for expert in range(self.num_experts)) / self.num_experts)


def biases_of(experts: Sequence[StructuredLinear]) -> nn.Parameter | None:  # (E, O)
    """A row for each expert, zero where it has no bias; None where no expert has one."""
    like = next((expert.bias for expert in experts if expert.bias is not None), None)
    if like is None:
        return None
    rows = [torch.zeros_like(like) if expert.bias is None else expert.bias for expert in experts]
    return nn.Parameter(torch.stack(rows).detach())


class Experts(nn.Module):
    """Each token's sum over its experts of weight * down_e(gate(up_e(x))), with a `StackedLinear` for both products.

    It is called like the module in which transformers fuses the experts, and stands in for it.

    Args:
        shell: that module without its weights. It says how to gate, and what makes up the dense module again. Its
            children (an activation, a norm after each expert) become children here; the shell itself is none.
        stacks: the stack into the experts (`gate_up`, or `up` where nothing is gated), then `down` out of them.
        experts_per_token: how many experts the router chooses for a token.
    """

    shell: Any

    def __init__(self, shell: nn.Module, stacks: Mapping[str, StackedLinear], experts_per_token: int) -> None:
        super().__init__()
        self.__dict__["shell"] = shell
        self.names = tuple(stacks)
        self.experts_per_token = experts_per_token
        for name, module in (*shell.named_children(), *stacks.items()):
            self.add_module(name, module)

    @property
    def stacks(self) -> dict[str, StackedLinear]:
        return {name: cast(StackedLinear, self.get_submodule(name)) for name in self.names}

    @property
    def num_experts(self) -> int:
        return self.stacks["down"].num_experts

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # (N, D), (N, K), (N, K)
        """The index `num_experts` stands for no expert at all."""
        if self._is_grouped(hidden, top_k_index.numel()):
            return self._grouped(hidden, top_k_index, top_k_weights)
        choice, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)  # (N * K,), (N * K, 1)
        counts = torch.bincount(choice, minlength=self.num_experts)[: self.num_experts].tolist()
        picks = choice.argsort(stable=True)[: sum(counts)]  # those of expert 0 first, those of no expert cut off
        out = torch.zeros_like(hidden)
        for expert, mine in enumerate(picks.split(counts)):
            if not len(mine):
                continue
            tokens = mine // top_k_index.shape[-1]
            y = self._at(hidden[tokens], expert)
            out.index_add_(0, tokens, (y * weights[mine]).to(out.dtype))
        return out  # (N, D)

    def _grouped(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same in one product for each factor of a stack; no shape depends on what the router chose."""
        E, K = self.num_experts, top_k_index.shape[-1]
        sorted_choice, picks = top_k_index.reshape(-1).sort(stable=True)
        # Rows of no expert come last. They go to the last expert, because the product wants an expert for each row.
        experts = sorted_choice.clamp(max=E - 1)
        ends = torch.searchsorted(experts, torch.arange(E, device=experts.device), right=True, out_int32=True)
        tokens = picks // K
        y = self._at(hidden[tokens], Groups(experts, ends)) * top_k_weights.reshape(-1, 1)[picks]
        y = y.masked_fill((sorted_choice == E)[:, None], 0).to(hidden.dtype)
        return torch.zeros_like(hidden).index_add(0, tokens, y)

    def _at(self, x: Tensor, expert: int | Groups) -> Tensor:  # (S, D) -> (S, D)
        up, down = self.stacks.values()
        act = self.shell._apply_gate if self.shell.has_gate else self.shell.act_fn
        y = down(act(up(x, expert)), expert)
        return self.get_submodule("post_expert_norm")(y) if self.shell.has_post_expert_norm else y

    def _is_grouped(self, hidden: Tensor, num_rows: int) -> bool:
        """Whether both stacks have a grouped form, nobody watches single experts, and outside of a graph both gain."""
        stacks = self.stacks.values()
        if any(has_hooks(stack) or not stack.has_groups for stack in stacks):
            return False
        if torch.compiler.is_compiling() or hidden.is_meta:
            return True
        return all(stack.gains_from_groups(hidden, num_rows) for stack in stacks)
