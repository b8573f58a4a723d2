"""What is done to the tokens of pictures: planted, added, taken out, compared."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.planting import planted

_SAME = 0.1
"""Share of the usual squared distance between pictures' tokens up to which two pictures are the same but for noise."""


def plant(host: torch.Tensor, source: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """The host's tokens (image tokens, width) with the source's at `positions` planted; what is not there counts nothing."""
    chosen = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    chosen[[p for p in positions if 0 <= p < len(source)]] = True
    return planted(host, source, chosen)


def add_residual(hosts: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The hosts' tokens plus what the sources have on average more than they.

    Only pictures of the number of tokens that is most common among the sources count; hosts of another number stay as they are.
    """
    usual = usual_tokens(sources)
    taken = [tokens for tokens in hosts if len(tokens) == len(usual)]
    if not taken:
        return list(hosts)
    residual = usual - torch.stack(taken).mean(0)
    return [tokens + residual if len(tokens) == len(usual) else tokens for tokens in hosts]


def usual_tokens(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the pictures with the most common number of tokens, (image tokens, width)."""
    length = collections.Counter(map(len, pictures)).most_common(1)[0][0]
    return torch.stack([tokens for tokens in pictures if len(tokens) == length]).mean(0)


def of_length(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens (any, width) as many as `length`: cut, or the mean of them for those that are missing."""
    missing = max(0, length - len(tokens))
    return torch.cat([tokens[:length], tokens.mean(0, keepdim=True).expand(missing, -1)])


def different_pictures(pictures: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int:
    """How many pictures differ by more than noise; pictures with different numbers of tokens do.

    Args:
        pictures: their tokens, each (image tokens, width).
        others: the tokens of other pictures, which tell how far apart pictures are.
    """
    apart = [_squared_distance(one, two) for one, two in itertools.pairwise(others)]
    limit = _SAME * float(np.median(apart)) if apart else 0.0
    found: list[torch.Tensor] = []
    for tokens in pictures:
        if all(len(tokens) != len(one) or _squared_distance(tokens, one) > limit for one in found):
            found.append(tokens)
    return len(found)


def _squared_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared distance of the tokens of two pictures, (any, width) each, as far as both have them."""
    both = min(len(one), len(other))
    return float((one[:both].float() - other[:both].float()).square().sum(-1).mean())
