"""Picture tokens of one prompt planted into another: what both causal tests do, the filter's and the guard's."""

from __future__ import annotations

import torch


def planted(host: torch.Tensor, source: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """A host's picture tokens with some of a source's in the place of those of the same number.

    What lies beyond the host's last token (a second picture, a larger one) goes to its place in proportion, if that is free.

    Args:
        host: (host tokens, width); stays as it is.
        source: (source tokens, width).
        chosen: bool (source tokens,), those that are planted.

    Returns:
        (host tokens, width).
    """
    tokens = host.clone()
    if not len(host):
        return tokens
    wanted = chosen.nonzero()[:, 0]
    near, far = wanted[wanted < len(host)], wanted[wanted >= len(host)]
    tokens[near] = source[near].to(host.dtype)
    places = far * len(host) // len(source)
    free = ~chosen[places]
    tokens[places[free]] = source[far[free]].to(host.dtype)
    return tokens
