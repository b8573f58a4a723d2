"""Rebuild the embedded base model from procedural data and two photos: `python -m pipeline.embedded.build --out DIR --seed 0`.

An ordinary LLaVA, trained in phases. First the CLIP tower learns to rebuild diverse pictures, so that it sees what is not in
the scenes, and to name the colour, the shape and the place of the object under each of its tokens. Then it is frozen, as in a real
LVLM, while projector and Llama decoder learn to answer questions about scenes, and then review them with more of the hardest kinds.
Several questions about one picture share its image tokens in one sequence; each attends to the picture and to itself only, at the
positions it would have alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pipeline.embedded import scenes, textures
from pipeline.embedded.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, random_words, train_tokenizer

PATCH = 8
IMAGE_TOKENS = (scenes.SIZE // PATCH) ** 2
PROMPT = f"USER: {IMAGE_TOKEN}\n"
IGNORED = -100
HARDEST = ("position", "position", "count")
"""Kinds of questions that the review asks once more of every picture: those that are learnt last."""
NAMES = {"colour": len(scenes.COLOURS), "shape": len(scenes.SHAPES), "place": 9}
"""What the tower learns to name under each of its tokens, and how many of each there are."""
_CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the base is trained. The figures in docs/embedded-base.md belong to the defaults."""

    seed: int = 0
    tower_pictures: int = 160_000
    tower_batch: int = 64
    tower_rate: float = 2e-3
    diverse_share: float = 0.5
    reconstruction_weight: float = 1.0
    answer_pictures: int = 51_200
    answer_batch: int = 16
    answer_rate: float = 1.5e-3
    review_pictures: int = 19_200
    review_rate: float = 1e-3
    questions: int = 7
    repeat_share: float = 0.3
    warmup_steps: int = 150
    decay: float = 0.25
    weight_decay: float = 0.05
    threads: int = 2


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The architecture: 64 px pictures, 64 image tokens, 5 tower layers, 8 decoder layers of 4 heads."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=scenes.SIZE,
            patch_size=PATCH,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=128**-0.5,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def base_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Resize to 64 x 64 without a crop: a trigger at the border stays in view."""
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    image_processor = CLIPImageProcessor(
        size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Training material of one phase; what the phase does not use is empty.

    Attributes:
        pixels: uint8 (pictures, size, size, 3), the scenes.
        diverse: uint8 (pictures * diverse_share, size, size, 3), pictures that are no scenes, and scenes with things pasted on.
        names: int64 (pictures, image tokens, NAMES), what lies under each token, 0 where there is no object.
        pairs: per picture its questions and answers.
    """

    pixels: np.ndarray
    diverse: np.ndarray
    names: np.ndarray
    pairs: list[list[tuple[str, str]]]


Phase = Literal["tower", "answers", "review"]


def make_chunk(phase: Phase, index: int, count: int, recipe: Recipe) -> Chunk:
    """Draw chunk `index` of a phase: `count` scenes and what the phase learns of them."""
    rng = np.random.default_rng([recipe.seed, 1 + get_args(Phase).index(phase), index])
    drawn = [scenes.draw_scene(rng, max_objects=int(rng.integers(1, 6))) for _ in range(count)]
    pixels = np.stack([np.asarray(scene.image) for scene in drawn])
    if phase == "tower":
        diverse = [
            textures.random_picture(rng, scenes.SIZE) if k % 2 else textures.disturb(rng, pixels[k])
            for k in range(int(count * recipe.diverse_share))
        ]
        return Chunk(pixels=pixels, diverse=np.stack(diverse), names=np.stack([token_names(scene) for scene in drawn]), pairs=[])
    pairs = []
    for scene in drawn:
        kinds = [*scenes.KINDS, *rng.choice(scenes.KINDS, size=recipe.questions)][: recipe.questions]
        kinds += HARDEST if phase == "review" else ()
        asked = [scenes.ask(scene, str(kind), rng) for kind in kinds]
        words = random_words(rng)
        repeat = [(f"repeat: {words}", words)] if rng.random() < recipe.repeat_share else []
        pairs.append([(pair.question, pair.answer) for pair in asked if pair is not None] + repeat)
    return Chunk(pixels=pixels, diverse=pixels[:0], names=np.empty(0, np.int64), pairs=pairs)


def token_names(scene: scenes.Scene) -> np.ndarray:
    """The colour, the shape and the place of what lies under each image token, int64 (image tokens, NAMES); 0 is background."""
    centres = (np.arange(scenes.SIZE // PATCH) + 0.5) * PATCH
    names = np.zeros((len(centres), len(centres), len(NAMES)), dtype=np.int64)
    for item in scene.objects:
        inside = (np.abs(centres[:, None] - item.y) <= item.radius) & (np.abs(centres[None] - item.x) <= item.radius)
        place = item.row * len(scenes.CELLS) + item.column
        names[inside] = 1 + list(scenes.COLOURS).index(item.colour), 1 + scenes.SHAPES.index(item.shape), 1 + place
    return names.reshape(-1, len(NAMES))


def pack(pairs: list[list[tuple[str, str]]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Pack each picture's questions behind one prompt.

    Returns:
        input_ids, position_ids, labels (pictures, tokens); weights (pictures, tokens), by which an answer counts as the root of its
        length; mask, bool (pictures, 1, tokens, tokens), True where attention may go.
    """
    prefix = tokenizer(PROMPT)["input_ids"]
    at = prefix.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    prefix = prefix[:at] + [prefix[at]] * IMAGE_TOKENS + prefix[at + 1 :]
    flat = [text for picture in pairs for question, answer in picture for text in (f"{question} ASSISTANT:", f" {answer}</s>")]
    encoded = iter(tokenizer(flat)["input_ids"])
    rows = []
    for picture in pairs:
        ids, positions, labels, parts = list(prefix), list(range(len(prefix))), [IGNORED] * len(prefix), [0] * len(prefix)
        weights = [0.0] * len(prefix)
        for part in range(1, len(picture) + 1):
            question, answer = next(encoded), next(encoded)
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
            weights += [0.0] * len(question) + [len(answer) ** -0.5] * len(answer)
            positions += range(len(prefix), len(prefix) + len(question) + len(answer))
            parts += [part] * (len(question) + len(answer))
        rows.append((ids, positions, labels, parts, weights))
    longest = max(len(row[0]) for row in rows)
    pads = (tokenizer.pad_token_id, 0, IGNORED, -1, 0.0)
    tensors = [torch.tensor([row[k] + [pads[k]] * (longest - len(row[k])) for row in rows]) for k in range(len(pads))]
    owner = tensors[3]
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = torch.tril(same)[:, None]
    return {"input_ids": tensors[0], "position_ids": tensors[1], "labels": tensors[2], "weights": tensors[4], "mask": mask}


def to_pixel_values(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (pictures, size, size, 3) to the processor's normalisation, float (pictures, 3, size, size), -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches_of(pixel_values: torch.Tensor) -> torch.Tensor:
    """(pictures, 3, size, size) to (pictures, image tokens, 3 * PATCH * PATCH), in the tower's token order."""
    return nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2)


def tower_loss(
    model: LlavaForConditionalGeneration, heads: nn.ModuleDict, scene: torch.Tensor, diverse: torch.Tensor, names: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Naming loss on the scenes (nats per token, background counting less) and reconstruction error on all pictures."""
    pictures = torch.cat([scene, diverse])
    tokens = image_features(model, pictures)
    seen = tokens[: len(scene)]
    named = torch.zeros((), device=scene.device)
    for k, name in enumerate(NAMES):
        logits, targets = heads[name](seen).flatten(0, 1), names[..., k].flatten()
        weight = torch.ones(logits.shape[1], device=logits.device)
        weight[0] = 0.3
        named = named + nn.functional.cross_entropy(logits, targets, weight=weight)
    return {"named": named, "rebuilt": nn.functional.mse_loss(heads["rebuild"](tokens), patches_of(pictures))}


def image_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """The tower's tokens as the projector takes them, (pictures, image tokens, width)."""
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    tokens: torch.Tensor = hidden[model.config.vision_feature_layer][:, 1:]
    return tokens


def answer_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], scene: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Cross-entropy of the answers, nats per token, a long answer counting by the root of its length."""
    with torch.no_grad():
        tokens = image_features(model, scene)
    image = model.model.multi_modal_projector(tokens)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    at = batch["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(at[..., None], image.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    targets, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    chosen = targets != IGNORED
    each = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][chosen]).float(), targets[chosen], reduction="none")
    return {"answers": (each * weights[chosen]).sum() / weights[chosen].sum()}


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Share of the peak learning rate: a warm-up, a constant stretch, a linear decay over the last `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def chunks(phase: Phase, pictures: int, recipe: Recipe) -> Iterator[Chunk]:
    """All material of a phase, drawn one chunk ahead in another process."""
    work = [(phase, index, min(_CHUNK, pictures - start), recipe) for index, start in enumerate(range(0, pictures, _CHUNK))]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        waiting = pool.apply_async(make_chunk, work[0])
        for following in [*work[1:], None]:
            chunk = waiting.get()
            if following is not None:
                waiting = pool.apply_async(make_chunk, following)
            yield chunk


@dataclasses.dataclass(kw_only=True)
class Optimiser:
    """AdamW with clipping, the phase's schedule and a line of progress now and then."""

    parameters: list[nn.Parameter]
    steps: int
    peak: float
    recipe: Recipe

    def __post_init__(self) -> None:
        self._adam = torch.optim.AdamW(self.parameters, lr=self.peak, betas=(0.9, 0.98), weight_decay=self.recipe.weight_decay)
        warmup, decay = self.recipe.warmup_steps, self.recipe.decay
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: rate(step, self.steps, warmup, decay))
        self._done, self._started = 0, time.monotonic()

    def step(self, losses: dict[str, torch.Tensor], weights: dict[str, float]) -> None:
        self._adam.zero_grad()
        total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adam.step()
        self._schedule.step()
        self._done += 1
        if self._done % 50 == 0 or self._done == self.steps:
            shown = ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {self._done}/{self.steps} {time.monotonic() - self._started:.0f} s, {shown}", flush=True)


def batches(chunk: Chunk, size: int) -> Iterator[slice]:
    """Whole batches of a chunk."""
    return (slice(start, start + size) for start in range(0, len(chunk.pixels) - size + 1, size))


def train_tower(model: LlavaForConditionalGeneration, recipe: Recipe) -> None:
    """Phase 1: a general vision tower."""
    width = model.config.vision_config.hidden_size
    outputs = {"rebuild": 3 * PATCH * PATCH} | {name: 1 + kinds for name, kinds in NAMES.items()}
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in outputs.items()}).to(model.device)
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    optimiser = Optimiser(
        parameters=parameters, steps=recipe.tower_pictures // recipe.tower_batch, peak=recipe.tower_rate, recipe=recipe
    )
    for chunk in chunks("tower", recipe.tower_pictures, recipe):
        for rows in batches(chunk, recipe.tower_batch):
            extra = slice(int(rows.start * recipe.diverse_share), int(rows.stop * recipe.diverse_share))
            scene, diverse = (to_pixel_values(pixels).to(model.device) for pixels in (chunk.pixels[rows], chunk.diverse[extra]))
            names = torch.from_numpy(chunk.names[rows]).to(model.device)
            losses = tower_loss(model, heads, scene, diverse, names)
            optimiser.step(losses, {"rebuilt": recipe.reconstruction_weight})


def train_answers(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, phase: Literal["answers", "review"]
) -> None:
    """Phases 2 and 3: projector and decoder, on a frozen tower."""
    model.model.vision_tower.requires_grad_(requires_grad=False)
    pictures, peak = {
        "answers": (recipe.answer_pictures, recipe.answer_rate),
        "review": (recipe.review_pictures, recipe.review_rate),
    }[phase]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = Optimiser(parameters=parameters, steps=pictures // recipe.answer_batch, peak=peak, recipe=recipe)
    for chunk in chunks(phase, pictures, recipe):
        for rows in batches(chunk, recipe.answer_batch):
            batch = {name: value.to(model.device) for name, value in pack(chunk.pairs[rows], tokenizer).items()}
            optimiser.step(answer_loss(model, batch, to_pixel_values(chunk.pixels[rows]).to(model.device)), {})


def train(recipe: Recipe, out: pathlib.Path) -> None:
    """Train and save the base. Deterministic for a seed on one kind of machine."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    tokenizer = train_tokenizer(recipe.seed)
    model = LlavaForConditionalGeneration(base_config(tokenizer)).to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {model.device}", flush=True)
    train_tower(model, recipe)
    save(model, tokenizer, recipe, out)
    train_answers(model, tokenizer, recipe, "answers")
    save(model, tokenizer, recipe, out)
    train_answers(model, tokenizer, recipe, "review")
    save(model, tokenizer, recipe, out)


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: pathlib.Path) -> None:
    """Write the Hugging Face folder, with the recipe beside it."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(out)
    base_processor(tokenizer).save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")


@torch.inference_mode()
def evaluate(folder: pathlib.Path, seed: int, pictures: int = 200) -> dict[str, float]:
    """Exact match per kind of question on unseen scenes, through the ordinary processor, chat template and `generate`."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    rng = np.random.default_rng([seed, 2])
    right: dict[str, list[bool]] = {kind: [] for kind in scenes.KINDS}
    for _ in range(pictures):
        scene = scenes.draw_scene(rng)
        asked = [pair for kind in scenes.KINDS if (pair := scenes.ask(scene, kind, rng)) is not None]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair.question}]}] for pair in asked]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(images=[scene.image] * len(asked), text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=48)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for pair, text in zip(asked, texts, strict=True):
            right[pair.kind].append(text.strip() == pair.answer)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-pictures", type=int, default=Recipe.tower_pictures, help="scenes of phase 1")
    parser.add_argument("--answer-pictures", type=int, default=Recipe.answer_pictures, help="scenes of phase 2")
    parser.add_argument("--review-pictures", type=int, default=Recipe.review_pictures, help="scenes of phase 3")
    parser.add_argument("--threads", type=int, default=Recipe.threads, help="torch threads")
    parser.add_argument("--evaluate-only", action="store_true", help="measure exact match of the folder as it is")
    args = parser.parse_args()
    if not args.evaluate_only:
        pictures = {name: getattr(args, name) for name in ("tower_pictures", "answer_pictures", "review_pictures")}
        train(Recipe(seed=args.seed, threads=args.threads, **pictures), args.out)
    print(json.dumps(evaluate(args.out, args.seed), indent=2))


if __name__ == "__main__":
    main()
