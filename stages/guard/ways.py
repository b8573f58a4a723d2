"""The ways to generate that a guard can't follow; each is refused by the name of the setting that asks for it.

What is refused here would draft tokens into the prefill, run the model on other prompts inside the call, or keep the cache where
the guard can't replace a row of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from pipeline.errors import ConfigError

_DRAFTS = "drafts tokens into the prompt's prefill, which the guard must see alone"
_OTHER_CODE = "lets other code run the model, in ways that the guard can't follow"
_OTHER_PROMPT = "runs the model on a second prompt, whose tokens the guard does not know"
_REFUSED = {
    "assistant_model": _DRAFTS,
    "prompt_lookup_num_tokens": _DRAFTS,
    "assistant_early_exit": _DRAFTS,
    "use_mtp": _DRAFTS,
    "prefill_chunk_size": "cuts the prompt's prefill, which the guard must see whole",
    "token_healing": "changes the prompt, and runs the model to find out how",
    "negative_prompt_ids": _OTHER_PROMPT,
    "custom_generate": _OTHER_CODE,
    "trust_remote_code": _OTHER_CODE,
    "output_attentions": "asks for attention maps, which the guard's attention does not make",
}
"""Settings that are refused where they are set at all, and why."""
_CACHES = frozenset({"dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked"})
"""Values of `cache_implementation` whose caches hold each row's keys as they are, on the model's device."""


def refuse_ways(base: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Look at the settings of a `generate` call before anything runs.

    Args:
        base: the model, for its own generation settings.
        inputs: the arguments of `generate`, by name.

    Raises:
        ConfigError: names the setting, why it is refused, and what to do instead where that is not to leave it out.
    """
    for name, why in _REFUSED.items():
        value = _setting(base, inputs, name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}: it {why}; a guarded model generates without it")
    if _setting(base, inputs, "guidance_scale") not in (None, 1):
        raise ConfigError(f"guidance_scale: it {_OTHER_PROMPT}; a guarded model generates without it")
    if getattr(_setting(base, inputs, "compile_config"), "fullgraph", False):
        raise ConfigError("compile_config: a guarded model's attention can't be part of one graph; leave fullgraph at False")
    kind = _setting(base, inputs, "cache_implementation")
    if kind is not None and kind not in _CACHES:
        raise ConfigError(f"cache_implementation: the guard can't replace rows of a cache that is {kind}; use dynamic or static")
    _refuse_cache(inputs.get("past_key_values"))


def _refuse_cache(cache: Any) -> None:
    """Raise ConfigError for a caller's own cache that holds tokens already, or whose rows the guard can't replace."""
    if cache is None:
        return
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise ConfigError("past_key_values: the guard can replace rows of a DynamicCache or StaticCache alone, not offloaded")
    if int(cache.get_seq_length()):
        raise ConfigError(
            "past_key_values: the guard must see the whole prompt in one prefill, and this cache holds a part of it; "
            "give the whole conversation with all its pictures, without past_key_values"
        )


def end_tokens(base: PreTrainedModel, inputs: Mapping[str, Any]) -> set[int]:
    """The tokens that end or pad an answer of a `generate` call."""
    named = (_setting(base, inputs, name) for name in ("eos_token_id", "pad_token_id"))
    return {int(token) for value in named if value is not None for token in torch.as_tensor(value).flatten()}


def _setting(base: PreTrainedModel, inputs: Mapping[str, Any], name: str) -> Any:
    """What `generate` goes by: its argument, what its generation_config says, or what the model's own does."""
    if name in inputs:
        return inputs[name]
    given = getattr(inputs.get("generation_config"), name, None)
    return getattr(base.generation_config, name, None) if given is None else given
