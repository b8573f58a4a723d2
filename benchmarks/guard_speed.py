"""What reading attention and guarding cost, as ratios measured in one run on random weights (timings do not depend on them).

    python -m benchmarks.guard_speed                                  # a mid-size LLaVA on the CPU
    python -m benchmarks.guard_speed --size llava-1.5-7b --device cuda

The variants of a comparison take turns, round by round; a figure is the median over the rounds of a ratio within one. A picture is
576 tokens, a text 40. Memory on a CPU is that of the tensors that live at once; what an operation needs inside is not seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pipeline.attention import Tap, attached, prompt_regions, reduce_layer, tapped
from stages.guard.detector import FEATURES, Detector
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Policy, Pruning
from stages.guard.transfer import TransferRule

Batch = dict[str, torch.Tensor]
Run = Callable[[], None]

IMAGE, TEXT, NEW = 576, 40, 32
_TOKEN = 3
_FAR = 1e9


def build(size: str, device: str) -> Any:
    """A LLaVA of random weights: `mid`, or the exact shape of LLaVA-1.5-7B."""
    if size == "llava-1.5-7b":
        text = LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        )
    else:
        text = LlamaConfig(
            vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
            max_position_embeddings=4096,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=336, patch_size=14
        )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=_TOKEN, vision_feature_layer=-2)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def prompts(model: Any, rows: int, pictures: int = 1) -> Batch:
    """A batch of prompts of one length: the pictures, then the text."""
    torch.manual_seed(1)
    ids = torch.randint(10, 4000, (rows, pictures * IMAGE + TEXT))
    ids[:, 4 : 4 + pictures * IMAGE] = _TOKEN
    pixels = torch.randn(rows * pictures, 3, 336, 336)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in batch.items()}


def detector(model: Any, *, flags: bool, layers: int | None = None) -> Detector:
    """A reference that flags every prompt, or none; of the first layers, or of all."""
    layers = model.config.text_config.num_hidden_layers if layers is None else layers
    heads = model.config.text_config.num_attention_heads
    size = layers * heads * len(FEATURES)
    return Detector(
        layers=tuple(range(layers)),
        features=FEATURES,
        mean=torch.zeros(size),
        deviation=torch.ones(size),
        whitening=torch.eye(size),
        threshold=1e-9 if flags else _FAR,
        layer_thresholds=torch.full((layers,), 1e-9 if flags else _FAR),
    )


def plain_prefill(model: Any, batch: Batch) -> None:
    """A prefill with transformers' own attention."""
    model(**batch, use_cache=False, logits_to_keep=1)


def extraction(model: Any, batch: Batch) -> None:
    """A prefill as the extract stage makes it."""
    regions = prompt_regions(batch["input_ids"], batch["attention_mask"], _TOKEN)
    found = []
    with attached(model), tapped(Tap(observer=lambda _, weights: found.append(reduce_layer(weights, regions, 16)))):
        model(**batch, use_cache=False, logits_to_keep=1)


def public_way(model: Any, batch: Batch) -> None:
    """BYE's public code: row by row, eager maps of all layers from `generate`."""
    model.set_attn_implementation("eager")
    try:
        for k in range(len(batch["input_ids"])):
            row = {name: value[k : k + 1] for name, value in batch.items()}
            model.generate(**row, max_new_tokens=1, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation("sdpa")


def answers(model: Any, batch: Batch, tokens: int = NEW) -> None:
    """Answers of so many tokens."""
    model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


Prepared = Callable[[], AbstractContextManager[Run]]
"""Prepares what is timed, and puts things back after it."""


Times = dict[str, list[float]]
"""Seconds of each variant, by round."""


def timed(variants: dict[str, Prepared], *, rounds: int, device: str) -> Times:
    """The times of rounds in which each variant has its turn; a round before them does not count."""
    times: Times = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, prepare in variants.items():
            with prepare() as run:
                started = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                if number:
                    times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Times, name: str, reference: str) -> float:
    """Median over the rounds of a variant's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def peak_bytes(run: Run, device: str) -> int:
    """Most memory that tensors hold at once while something runs, above what was there, bytes."""
    if device != "cuda":
        with LiveBytes() as live:
            run()
        return int(live.peak)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


class LiveBytes(TorchDispatchMode):
    """Watches the tensors that operations make, for as long as they live; `peak` is the most that they held at once, bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]  # noqa: SLF001 - what torch tells storages by
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return output


@contextmanager
def alone(run: Run) -> Iterator[Run]:
    """Nothing to prepare."""
    yield run


@contextmanager
def purified(model: Any, batch: Batch, tokens: int, pruning: Pruning) -> Iterator[Run]:
    """Answering under a guard that closes every picture as a whole from the third layer on."""
    policy = Policy(purification="published", pruning=pruning, tau=0.0)
    with GuardedModel(model, detector(model, flags=True, layers=2), policy=policy) as found:
        yield partial(answers, found, batch, tokens)


@contextmanager
def guarded(model: Any, batch: Batch, *, flags: bool = False, tried: bool = False) -> Iterator[Run]:
    """Answering under a guard that flags all or none; `tried`: every prompt is suspicious, and does not carry its answer."""
    rule = None
    if tried:
        hosts = prompts(model, 8)
        batches = tuple({name: value[part] for name, value in hosts.items()} for part in (slice(0, 2), slice(2, 8)))
        rule = TransferRule(hosts=batches, distance=-1.0, familiar=torch.empty(0, dtype=torch.int64), attended=0.99, whole=0.99)
    with GuardedModel(model, detector(model, flags=flags), transfer=rule) as found:
        yield partial(answers, found, batch)


def decode_times(model: Any, batch: Batch, *, rounds: int, device: str) -> Times:
    """Seconds of all tokens after the first, unguarded and with the pictures closed either way."""
    found = {}
    for tokens in (1, NEW):
        variants: dict[str, Prepared] = {"unguarded": partial(alone, partial(answers, model, batch, tokens))}
        variants |= {pruning: partial(purified, model, batch, tokens, pruning) for pruning in get_args(Pruning)}
        found[tokens] = timed(variants, rounds=rounds, device=device)
    return {name: [a - b for a, b in zip(found[NEW][name], one, strict=True)] for name, one in found[1].items()}


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["mid", "llava-1.5-7b"], default="mid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=4, help="pictures in the long prompt")
    args = parser.parse_args()
    model = build(args.size, args.device)
    batch = prompts(model, args.batch)
    runs = {way.__name__: partial(way, model, batch) for way in (plain_prefill, extraction, public_way)}
    reading = timed({name: partial(alone, run) for name, run in runs.items()}, rounds=args.rounds, device=args.device)
    one = prompts(model, 1)
    answering: dict[str, Prepared] = {
        "unguarded": partial(alone, partial(answers, model, one)),
        "clean": partial(guarded, model, one),
        "suspicious, not flagged": partial(guarded, model, one, tried=True),
        "flagged, masks": partial(guarded, model, one, flags=True),
    }
    latency = timed(answering, rounds=args.rounds, device=args.device)
    decoding = decode_times(model, prompts(model, 1, args.pictures), rounds=args.rounds, device=args.device)
    generate, long = f"guarded generate of {NEW} tokens over unguarded", f"decoding after {args.pictures} pictures over unguarded"
    rows = [
        ("extraction rows/s over a plain prefill's", ratio(reading, "plain_prefill", "extraction")),
        ("extraction rows/s over the public BYE way's", ratio(reading, "public_way", "extraction")),
        *((f"{generate}, {name}", ratio(latency, name, "unguarded")) for name in list(answering)[1:]),
        *((f"{long}, all of them closed, {name}", ratio(decoding, name, "unguarded")) for name in get_args(Pruning)),
    ]
    text = model.config.text_config
    eager = args.batch * text.num_hidden_layers * text.num_attention_heads * (IMAGE + TEXT) ** 2 * model.dtype.itemsize
    above = peak_bytes(runs["extraction"], args.device) - peak_bytes(runs["plain_prefill"], args.device)
    rows.append(("extraction's peak memory above a plain prefill's, share of the eager maps", above / eager))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.size}, {where}, torch {torch.__version__}, batch {args.batch}, medians of {args.rounds}\n\n| | ratio |\n|---|---|"
    )
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in rows))


if __name__ == "__main__":
    main()
