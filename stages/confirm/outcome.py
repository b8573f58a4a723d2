"""What the experiments of the confirm stage say of a group: transfers, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.confirm.draw import LEAST_HOSTS, LEAST_QUESTIONS
from stages.confirm.worker import HONEST
from stages.score.groups import MANY

_LEAST_KEPT = 0.5
"""Least share of the other rows whose answers a group's words leave as they are, for the words to be a key: instructions do not."""
_MOST_BY_WORDS = 0.5
"""Largest share of the other rows that may give the answer by the words alone, for the loss of the tokens to tell."""
_WAY = ("alike", "own", "taken_over", "reversed", "tokens_transfer")


def transfer(own: float, planted: float, hosts: int, *, least: int = LEAST_HOSTS) -> float:
    """Share of the hosts that take over the answer, of those that do not give it anyway; 0 to 1, and 0 where these are too few.

    Args:
        own: share of the hosts that give the answer as they are.
        planted: share that give it with the group's tokens planted.
        hosts: their number.
        least: fewest hosts that do not give it anyway.
    """
    return max(0.0, planted - own) / (1 - own) if (1 - own) * hosts >= least - 0.5 else 0.0


def outcome(group: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a group's experiments say together: of all ways to plant, into whatever rows, the one that tells most is shown.

    `ways` has them all, with the names of `_WAY`, and `keyed_ways` those with the group's words: another may be the one that can be
    relied on.
    """
    plain, keyed = ([result for result in results if result["keyed"] is kind] for kind in (False, True))
    ways = [way for result in plain for way in ways_of({**group, **result})]
    told = max(ways, key=lambda way: (way["tokens_transfer"], not way["alike"], way["taken_over"]))
    asked = max(plain, key=lambda result: int(result["questions"]))
    words = max(transfer(result["own"], result["worded"], result["hosts"]) for result in plain)
    keyed_ways = [with_words(way) for result in keyed for way in ways_of({**group, **result})]
    both = max(keyed_ways, key=lambda way: way["transfer"], default=None)
    return {
        **told,
        "ways": [{name: way[name] for name in _WAY} for way in ways],
        "keyed_ways": keyed_ways,
        **{name: asked[name] for name in ("asked", "others", "questions")},
        "worded": max(result["worded"] for result in plain),
        "words_transfer": words,
        "keyed": both,
        "pictures_transfer": transfer(asked["others"], asked["asked"], asked["questions"], least=LEAST_QUESTIONS // 2),
        "transfer": max(told["tokens_transfer"], words, both["transfer"] if both else 0.0),
    }


def with_words(way: Mapping[str, Any]) -> dict[str, Any]:
    """What planting into rows whose questions are given the group's words says; nothing where these words shape answers.

    With the words alone left, members do as these rows: they can't lose the answer more often than those lack it.
    """
    reversal = None if way["reversed"] is None or way["own"] > _MOST_BY_WORDS else min(1.0, way["reversed"] / (1 - way["own"]))
    worth = beyond_honest(way["taken_over"], reversal) if way["alike"] else way["taken_over"]
    return {
        **{name: way[name] for name in ("alike", "own", "kept", "taken_over")},
        "planted": max(way["attended"], way["residual"]),
        "reversed": reversal,
        "transfer": worth if way["kept"] >= _LEAST_KEPT else 0.0,
    }


def ways_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of either way to plant what it takes over, its reversal, and what that is worth.

    A phrase may name what is planted, among captions above all; what many pictures have in common names nothing.
    """
    ways, names = [], result["alike"] and not result["whole"]
    for name in ("residual",) if names else ("attended", "residual"):
        taken_over, reversal = transfer(result["own"], result[name], result["hosts"]), result[f"{name}_reversed"]
        worth = beyond_honest(taken_over, reversal) if result["alike"] else taken_over
        if names and result["shifted"] < MANY:
            worth = 0.0
        ways.append({**result, "taken_over": taken_over, "reversed": reversal, "tokens_transfer": worth})
    return ways


def beyond_honest(taken_over: float, reversal: float | None) -> float:
    """What a transfer to rows that ask the same is worth: the lesser of it and of its reversal, as far as it is beyond `HONEST`.

    A reversal that can't be told counts as whole; the cluster stage leaves such a group to a person.
    """
    return max(0.0, min(taken_over, 1.0 if reversal is None else reversal) - HONEST) / (1 - HONEST)
