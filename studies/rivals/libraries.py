"""Our decompositions beside those of tensorly, at the same ranks on the same weights: seconds and relative errors.

    pip install --no-deps --target build/tensorly tensorly scipy
    PYTHONPATH=build/tensorly python studies/rivals/libraries.py --model build/smollm2

The weights are those of block 14: `down` (576 x 1536) as a tensor train of 8 pairs of modes, and q, k, v, o as one
Tucker tensor over its heads. Rows are appended to libraries.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from tensorly.decomposition import partial_tucker, tensor_train_matrix

from tensormix.fitting.hooi import full_hosvd, hooi
from tensormix.models import load_model
from tensormix.operators.tensor_train import largest_ranks, mode_factors, tt_svd
from tensormix.storage.files import environment, now

ROUNDS = 3  # of each, the fastest counts


def fastest(make: Callable[[], Any]) -> tuple[float, Any]:
    found, made = [], None
    for _ in range(ROUNDS):
        began = time.process_time()
        made = make()
        found.append(time.process_time() - began)
    return min(found), made


def relative(made: torch.Tensor, weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(made - weight) / torch.linalg.vector_norm(weight))


def train_rows(weight: torch.Tensor, rank: int) -> list[dict[str, Any]]:  # (O, I)
    out, into = mode_factors(weight.shape[0], 8), mode_factors(weight.shape[1], 8)
    ranks = [min(rank, most) for most in largest_ranks(out, into)]
    seconds, (_, cut) = fastest(lambda: tt_svd(weight, out, into, ranks))
    ours = {"by": "tensormix", "seconds": seconds, "error": cut**0.5 / float(torch.linalg.vector_norm(weight))}
    seconds, made = fastest(lambda: tensor_train_matrix(weight.reshape(*out, *into), [1, *ranks, 1]))
    theirs = {"by": "tensorly", "seconds": seconds, "error": relative(made.to_matrix(), weight)}
    return [{"form": "tensor train", "rank": rank, **row} for row in (ours, theirs)]


def tucker_rows(stacked: torch.Tensor, ranks: tuple[int, int, int]) -> list[dict[str, Any]]:  # (D, H, C, 4)
    norm = float(stacked.square().sum())
    seconds, ours = fastest(lambda: hooi(full_hosvd([stacked]), ranks, steps=100, tolerance=1e-5))
    rows = [{"by": "tensormix", "seconds": seconds, "error": (1 - ours.energy / norm) ** 0.5}]

    def theirs() -> Any:
        return partial_tucker(stacked, list(ranks), modes=[0, 2, 3], n_iter_max=100, tol=1e-5, init="svd")

    seconds, ((core, _), _) = fastest(theirs)
    rows.append({"by": "tensorly", "seconds": seconds, "error": (1 - float(core.square().sum()) / norm) ** 0.5})
    return [{"form": "Tucker over heads", "ranks": list(ranks), **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    block = load_model(options.model, dtype="float32").model.layers[14]
    attention, heads = block.self_attn, 9
    q, k, v = (getattr(attention, f"{name}_proj").weight.detach().double() for name in "qkv")
    k, v = (w.view(3, 1, 64, -1).expand(3, 3, 64, -1).reshape(576, -1) for w in (k, v))
    o = attention.o_proj.weight.detach().double().T
    stacked = torch.stack([w.view(heads, 64, -1).permute(2, 0, 1) for w in (q, k, v, o)], dim=3)
    down = block.mlp.down_proj.weight.detach().double()
    rows = [*train_rows(down, 64), *train_rows(down, 256)]
    rows += [*tucker_rows(stacked, (64, 4, 2)), *tucker_rows(stacked, (288, 48, 4))]
    with Path(__file__).with_name("libraries.jsonl").open("a") as file:
        for row in rows:
            print(row)
            found = {"tensorly": tensorly.__version__, "environment": environment(), "finished": now()}
            file.write(json.dumps({**row, **found}) + "\n")


if __name__ == "__main__":
    main()
