"""The figures and tables of the two papers, and what draws each of them from run folders.

[M] is arXiv 2605.25344, [R] is arXiv 2606.03465. `key` is the id of the figure or table on the page, `needs` what must
have been measured for it to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .costs import size_figure
from .depths import accuracy_figure, perplexity_figure
from .drift import drift_map, drift_means
from .scaling import operator_figure, trend_figure
from .sites import storage_table
from .tables import details_table, resources_table
from .tradeoffs import entropy_trends, residual_figure, tradeoff_figure
from .weights import gap_figure, restoration_figure, sensitivity_figure, spectra_figure


@dataclass(frozen=True)
class Published:
    """One figure or table of a paper."""

    number: str
    key: str
    draw: Callable[..., Any]
    caption: str
    needs: str


PUBLISHED = (
    Published("[M] Fig. 1b", "operators", operator_figure, "parameters of an operator against width", "compress"),
    Published("[M] Fig. 1c", "scaling", trend_figure, "loss against model size beside a dense family", "sweep: family"),
    Published("[M] Fig. 2", "accuracy", accuracy_figure, "accuracy against depth; the other direction", "sweep"),
    Published("[M] Fig. 3a, b", "accuracy", accuracy_figure, "output and prediction entropy against depth", "sweep"),
    Published("[M] Fig. 3c, d", "entropy-trends", entropy_trends, "entropies against accuracy, dense trends", "sweep"),
    Published("[M] Fig. 4a", "drift-map", drift_map, "geometry drift by start layer and depth", "sweep"),
    Published("[M] Fig. 4b", "drift-means", drift_means, "mean drift with its two-segment fit", "sweep"),
    Published("[M] Table 1", "resources", resources_table, "parameters, MACs, memory, storage", "profile"),
    Published("[R] Fig. 1", "block-drop", sensitivity_figure, "perplexity without one block", "drop_sensitivity"),
    Published("[R] Fig. 2", "tradeoff", tradeoff_figure, "perplexity of methods against bits saved", "several runs"),
    Published("[R] Fig. 3", "tradeoff", tradeoff_figure, "C4 perplexity against bits saved", "perplexity of C4"),
    Published("[R] Fig. 4", "perplexity", perplexity_figure, "C4 perplexity against compressed layers", "sweep"),
    Published("[R] Fig. 5", "residual", residual_figure, "residual stream: angle, length", "residual_stream"),
    Published("[R] Fig. 6", "restoration", restoration_figure, "entries restored against rank", "restoration"),
    Published("[R] Fig. 7", "tradeoff", tradeoff_figure, "C4 perplexity with rounding beside it", "several runs"),
    Published("[R] Fig. 8", "block-compress", sensitivity_figure, "one block compressed", "compress_sensitivity"),
    Published("[R] Fig. 9", "restoration", restoration_figure, "the same without a super weight", "restoration: site"),
    Published("[R] Fig. 10", "tradeoff", tradeoff_figure, "WikiText-2 against bits saved", "perplexity of WikiText-2"),
    Published("[R] Fig. 11", "tradeoff", tradeoff_figure, "macro accuracy drop against bits saved", "benchmarks"),
    Published("[R] Fig. 12", "tradeoff", tradeoff_figure, "sparse corrections beside the plain format", "several runs"),
    Published("[R] Fig. 18", "perplexity", perplexity_figure, "C4 perplexity against compressed layers", "sweep"),
    Published("[R] Fig. 19", "residual", residual_figure, "residual stream of experts", "residual_stream"),
    Published("[R] Eq. 7", "spectral-gap", gap_figure, "spectral error beside its bound", "spectral_gap"),
    Published("[R] Table 1", "spectra", spectra_figure, "exponents of unfoldings", "spectra"),
    Published("[R] Table 3", "storage", storage_table, "local ratio and share saved of each method", "compress"),
    Published("[R] Table 4", "details", details_table, "bits, perplexities, benchmarks, angle, length", "run"),
    Published("ours", "size", size_figure, "accuracy against parameters and MACs", "profile"),
)


def numbers_of(key: str) -> str:
    """Which published figures a figure of the page corresponds to; nothing for ours alone."""
    return ", ".join(item.number for item in PUBLISHED if item.key == key and item.number != "ours")
