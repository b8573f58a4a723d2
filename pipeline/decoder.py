"""The language tower of any decoder-only LVLM: its attention layers, or the reason why ByeSight can't work with it.

A tower fits if its pictures are tokens of its own sequence and its self-attention goes through transformers' attention interface:
the module looks a function up by `config._attn_implementation` and calls it with queries, keys, values and a mask. Layers without
attention (convolutions, linear attention) may lie between; they are not counted.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ModelError

UNDERSTOOD = frozenset(
    {
        "attention_mask",
        "dropout",
        "is_causal",  # of a mask that is None
        "position_ids",  # read by packed sequences alone
        "s_aux",  # logits of attention sinks, one a head
        "scaling",
        "sliding_window",  # the mask says it too
        "softcap",  # bound of the logits
    }
)
"""What a layer may pass to its attention function by name, as in transformers 5; anything else could change the weights unseen."""

_WITH_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Values of a configuration's `layer_types` whose keys lie in the cache one a token, the newest last."""
_WITHOUT_ATTENTION = frozenset({"conv", "linear_attention", "mlp", "moe"})
"""Those whose layers have no softmax over keys."""
_CROSS_ATTENTION = re.compile(r"Cross_?Att", re.IGNORECASE)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language tower, the same object that its attention layers hold.

    Raises:
        ModelError: the model has several language towers.
    """
    try:
        return model.config.get_text_config()
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: which of its towers writes the answer can't be told: {error}") from error


def attention_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The self-attention modules of the language tower, in the order in which tokens pass them.

    A layer's place in this tuple is its number everywhere in ByeSight: in the probe, the tables and the guard. It is the decoder
    layer's own number where every layer has attention.

    Args:
        model: a transformers model without a PEFT wrapper; its weights are not looked at and may be on the meta device.

    Raises:
        ModelError: an encoder-decoder; pictures that come in by cross-attention; attention that does not use transformers'
            interface, or that passes it something which is not understood; layers of a kind that is not.
    """
    name, text = type(model).__name__, text_config(model)
    if not hasattr(text, "num_hidden_layers"):
        raise ModelError(f"{name}: its configuration describes no language tower")
    if getattr(model.config, "is_encoder_decoder", False) or text.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder; ByeSight needs a decoder that sees image tokens")
    modules: list[nn.Module] = list(model.get_decoder().modules())
    _refuse_cross_attention(name, modules)
    candidates = [module for module in modules if getattr(module, "config", None) is text]
    probed = {kind for kind in {type(module) for module in candidates} if _uses_interface(name, kind)}
    found: dict[int, nn.Module] = {}
    for module in candidates:
        if type(module) not in probed:
            continue
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise ModelError(f"{name}: {type(module).__name__} does not know its layer; its weights can't be told from others'")
        if index < text.num_hidden_layers and found.setdefault(index, module) is not module:
            raise ModelError(f"{name}: layer {index} has two attentions; which of them reads the image tokens can't be told")
    _check_kinds(name, text, set(found))
    return tuple(found[index] for index in sorted(found))


def is_hybrid(model: PreTrainedModel) -> bool:
    """Whether some layers of the language tower have no attention: tokens pass on what they know in another way there."""
    return len(attention_layers(model)) < int(text_config(model).num_hidden_layers)


def _check_kinds(name: str, text: Any, found: set[int]) -> None:
    """Raise ModelError unless every layer is of a kind that is understood, and its attention, if it has any, was found."""
    kinds: list[str] = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    if strange := sorted(set(kinds) - _WITH_ATTENTION - _WITHOUT_ATTENTION):
        raise ModelError(f"{name}: layers of kind {', '.join(strange)}: where a token's keys are kept there can't be told")
    missing = [index for index, kind in enumerate(kinds) if kind in _WITH_ATTENTION and index not in found]
    if missing or not found:
        which = f"layer {missing[0]} does not use" if found else "its layers do not use"
        raise ModelError(f"{name}: {which} transformers' attention interface; its attention can't be observed")


def _refuse_cross_attention(name: str, modules: list[nn.Module]) -> None:
    for module in modules:
        if _CROSS_ATTENTION.search(type(module).__name__) or getattr(module, "is_cross_attention", False):
            raise ModelError(
                f"{name}: its pictures come in by cross-attention ({type(module).__name__}), not as tokens of the sequence; "
                "there is no attention to image tokens to read or to close"
            )


def _uses_interface(name: str, kind: type[nn.Module]) -> bool:
    """Whether a module class calls the attention interface; raises ModelError if it passes what is not understood.

    transformers knows no other sign of it than the source: its own `_can_set_attn_implementation` reads it too.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
    ]
    if unknown := sorted({keyword.arg for call in calls for keyword in call.keywords if keyword.arg} - UNDERSTOOD):
        raise ModelError(
            f"{name}: {kind.__name__} passes {', '.join(unknown)} to its attention, which ByeSight does not understand; "
            "its weights can't be told"
        )
    return bool(calls)
