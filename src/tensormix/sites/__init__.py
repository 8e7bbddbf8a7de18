"""Where a model can be compressed: the only folder that knows how architectures name, fuse and call weights."""

from tensormix.sites.costs import cost_of, macs_per_token, num_parameters
from tensormix.sites.families import FUSED, ROLES, head_counts, is_conv1d, is_dense, role_of
from tensormix.sites.installing import check_shape, dense_at, fill_dense, install, is_replacement
from tensormix.sites.seen import returns_of
from tensormix.sites.sites import (
    Site,
    blocks,
    find_sites,
    locate_blocks,
    opened,
    takes_turns,
)

__all__ = [
    "FUSED",
    "ROLES",
    "Site",
    "blocks",
    "check_shape",
    "cost_of",
    "dense_at",
    "fill_dense",
    "find_sites",
    "head_counts",
    "install",
    "is_conv1d",
    "is_dense",
    "is_replacement",
    "locate_blocks",
    "macs_per_token",
    "num_parameters",
    "opened",
    "returns_of",
    "role_of",
    "takes_turns",
]
