"""The named places of a forward pass where it can be changed (edits) and read (taps).

In the residual stream, ``embed`` is behind the embedding, ``attn`` and ``mlp`` are behind the halves of a block,
``block`` is behind the whole block. ``ff`` is within the MLP: what its last projection, ``down``, reads. ``router`` is
within the MLP of a mixture, which has no ``ff``: what its router says of each token. An edit and a tap name the sites
they want. They are called while the pass is traced, at these sites alone, so a site that nobody names costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from jaxcrit.core.errors import UserError, did_you_mean, listed

Site = Literal["embed", "attn", "router", "ff", "mlp", "block"]
SITES: tuple[str, ...] = get_args(Site)
Visit = Callable[[Site, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of the residual stream. Two edits are equal where function and sites are, and then compile once.

    Attributes:
        change: function ``(site, before, after, data, positions) -> after``. ``before`` is the stream that enters the
            half or the block, ``after`` the stream behind it, both ``[B, T, D]``; at ``embed`` both are the embeddings,
            at ``ff`` both are what ``down`` reads, ``[B, T, F]``; at ``router`` ``before`` are the router's logits,
            ``after`` their softmax, the shares of all experts, of which the largest are then kept, ``[B, T, E]`` both,
            float32.
            ``data`` is the layer's slice of the arrays ``[L, ...]`` that are handed over beside the edit; at ``embed``,
            which has no layer, it is all of them. ``positions`` is ``[B, T]`` int32, each token's place in its
            sequence, also where a cache holds the tokens before it.
        sites: where it acts.
    """

    change: Callable[[Site, jax.Array, jax.Array, Any, jax.Array], jax.Array]
    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        _check(self.sites)


@dataclasses.dataclass(frozen=True)
class Tap:
    """What a forward pass keeps of the residual stream.

    Attributes:
        read: function ``(site, before, after, positions) -> anything``; arguments as of `Edit`, ``after`` as the edit
            left it. What it returns for a site inside the blocks is stacked over the layers; nothing else is kept.
        sites: where it reads.
    """

    read: Callable[[Site, jax.Array, jax.Array, jax.Array], Any]
    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        _check(self.sites)


def visitor(edit: Edit | None, data: Any, tap: Tap | None, positions: jax.Array) -> tuple[Visit, dict[str, Any]]:
    """Joins an edit and a tap to one function that is called at every site.

    Args:
        edit: the edit, or None.
        data: its data at this layer.
        tap: the tap, or None.
        positions: ``[B, T]`` int32.

    Returns:
        The function ``(site, before, after) -> after``, and the dictionary by site in which it puts what the tap
        returns.
    """
    found: dict[str, Any] = {}

    def visit(site: Site, before: jax.Array, after: jax.Array) -> jax.Array:
        if edit is not None and site in edit.sites:
            after = edit.change(site, before, after, data, positions)
        if tap is not None and site in tap.sites:
            found[site] = tap.read(site, before, after, positions)
        return after

    return visit, found


def _check(sites: tuple[Site, ...]) -> None:
    if isinstance(sites, str):
        raise UserError(f"sites={sites!r}: expected a tuple of sites, such as ({sites!r},)")
    for site in sites:
        if site not in SITES:
            raise UserError(f"sites: expected {listed(SITES)}, got {site!r}{did_you_mean(str(site), SITES)}")
