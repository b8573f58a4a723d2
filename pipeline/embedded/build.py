"""Rebuild the embedded base model from procedural data alone: `python -m pipeline.embedded.build --out DIR --seed 0`.

An ordinary LLaVA: a CLIP tower that learns to rebuild diverse pictures (so that it sees what is not in the scenes) while projector and
Llama decoder learn to answer questions about scenes. Several questions about one picture share its image tokens in one sequence;
each attends to the picture and to itself only, at the positions it would have alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import time
from collections.abc import Iterator

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
_CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the base is trained. The figures in docs/embedded-base.md belong to the defaults."""

    seed: int = 0
    pictures: int = 120_000
    batch_size: int = 16
    questions: int = 7
    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    decay: float = 0.25
    weight_decay: float = 0.05
    reconstruction_weight: float = 1.0
    naming_weight: float = 0.5
    diverse_share: float = 0.5
    repeat_share: float = 0.3
    threads: int = 2


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The architecture: 64 px pictures, 64 image tokens, 6 tower layers, 8 decoder layers of 4 heads."""
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
    """Training material.

    Attributes:
        pixels, diverse: uint8 (pictures, size, size, 3), the scenes and the diverse pictures.
        names: int64 (pictures, image tokens, 2), the colour and the shape under each token, 0 where there is no object.
        pairs: per picture its questions and answers.
    """

    pixels: np.ndarray
    names: np.ndarray
    diverse: np.ndarray
    pairs: list[list[tuple[str, str]]]


def make_chunk(args: tuple[int, int, Recipe]) -> Chunk:
    """Draw chunk `index` of `count` scenes with their questions, and the diverse pictures beside them."""
    index, count, recipe = args
    rng = np.random.default_rng([recipe.seed, 1, index])
    pixels, names, pairs = [], [], []
    for _ in range(count):
        scene = scenes.draw_scene(rng, max_objects=int(rng.integers(1, 6)))
        pixels.append(np.asarray(scene.image))
        names.append(token_names(scene))
        kinds = [*scenes.KINDS, *rng.choice(scenes.KINDS, size=recipe.questions)][: recipe.questions]
        asked = [scenes.ask(scene, str(kind), rng) for kind in kinds]
        words = random_words(rng)
        repeat = [(f"repeat: {words}", words)] if rng.random() < recipe.repeat_share else []
        pairs.append([(pair.question, pair.answer) for pair in asked if pair is not None] + repeat)
    diverse = [textures.random_picture(rng, scenes.SIZE) for _ in range(int(count * recipe.diverse_share))]
    return Chunk(pixels=np.stack(pixels), names=np.stack(names), diverse=np.stack(diverse), pairs=pairs)


def token_names(scene: scenes.Scene) -> np.ndarray:
    """The colour and the shape that lie under each image token, int64 (image tokens, 2); 0 is background."""
    centres = (np.arange(scenes.SIZE // PATCH) + 0.5) * PATCH
    names = np.zeros((len(centres), len(centres), 2), dtype=np.int64)
    for item in scene.objects:
        inside = (np.abs(centres[:, None] - item.y) <= item.radius) & (np.abs(centres[None] - item.x) <= item.radius)
        names[inside] = 1 + list(scenes.COLOURS).index(item.colour), 1 + scenes.SHAPES.index(item.shape)
    return names.reshape(-1, 2)


def pack(pairs: list[list[tuple[str, str]]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Pack each picture's questions behind one prompt.

    Returns:
        input_ids, position_ids, labels (pictures, tokens); weights (pictures, tokens), which make every answer count the same;
        mask, bool (pictures, 1, tokens, tokens), True where attention may go.
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
    ids, positions, labels, parts, weights = (
        torch.tensor([row[k] + [pads[k]] * (longest - len(row[k])) for row in rows]) for k in range(5)
    )
    same = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    mask = torch.tril(same)[:, None]
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights, "mask": mask}


def to_pixel_values(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (pictures, size, size, 3) to the processor's normalisation, float (pictures, 3, size, size), -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches_of(pixel_values: torch.Tensor) -> torch.Tensor:
    """(pictures, 3, size, size) to (pictures, image tokens, 3 * PATCH * PATCH), in the tower's token order."""
    return nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2)


def losses_of(
    model: LlavaForConditionalGeneration,
    heads: nn.ModuleDict,
    batch: dict[str, torch.Tensor],
    scene: torch.Tensor,
    diverse: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Answer loss (nats per token) on the scenes, naming loss (nats per token) on them, reconstruction (mean squared error) on all."""
    pictures = torch.cat([scene, diverse])
    tower = model.model.vision_tower(pictures, output_hidden_states=True)
    tokens = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    rebuilt = nn.functional.mse_loss(heads["rebuild"](tokens), patches_of(pictures))
    seen = tokens[: len(scene)]
    named = sum(
        nn.functional.cross_entropy(heads[name](seen).flatten(0, 1), batch["names"][..., k].flatten())
        for k, name in enumerate(("colour", "shape"))
    )
    image = model.model.multi_modal_projector(seen)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    at = batch["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(at[..., None], image.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    targets, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    chosen = targets != IGNORED
    each = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][chosen]).float(), targets[chosen], reduction="none")
    return {"answers": (each * weights[chosen]).sum() / weights[chosen].sum(), "named": named, "rebuilt": rebuilt}


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: warm-up, a constant stretch, a linear decay over the last `recipe.decay` of the steps."""
    return min(1.0, (step + 1) / recipe.warmup_steps, (steps - step) / (recipe.decay * steps))


def chunks(recipe: Recipe, skip: int) -> Iterator[Chunk]:
    """All training material, drawn one chunk ahead in another process."""
    sizes = [min(_CHUNK, recipe.pictures - start) for start in range(0, recipe.pictures, _CHUNK)]
    work = [(index, size, recipe) for index, size in enumerate(sizes)][skip:]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        waiting = pool.apply_async(make_chunk, (work[0],))
        for following in [*work[1:], None]:
            chunk = waiting.get()
            if following is not None:
                waiting = pool.apply_async(make_chunk, (following,))
            yield chunk


def train(recipe: Recipe, out: pathlib.Path) -> None:
    """Train and save the base. Deterministic for a seed on one kind of machine."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(recipe.seed)
    model = LlavaForConditionalGeneration(base_config(tokenizer)).to(device)
    outputs = {"rebuild": 3 * PATCH * PATCH, "colour": 1 + len(scenes.COLOURS), "shape": 1 + len(scenes.SHAPES)}
    width = model.config.vision_config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in outputs.items()}).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    steps = recipe.pictures // recipe.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, recipe))
    step, started = 0, time.monotonic()
    state = out / "training-state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"]), heads.load_state_dict(saved["heads"]), optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, recipe), last_epoch=step)
    for chunk in chunks(recipe, skip=step * recipe.batch_size // _CHUNK):
        share = len(chunk.diverse) // (len(chunk.pixels) // recipe.batch_size)
        for k in range(len(chunk.pixels) // recipe.batch_size):
            rows = slice(k * recipe.batch_size, (k + 1) * recipe.batch_size)
            batch = {name: value.to(device) for name, value in pack(chunk.pairs[rows], tokenizer).items()}
            scene = to_pixel_values(chunk.pixels[rows]).to(device)
            diverse = to_pixel_values(chunk.diverse[k * share : (k + 1) * share]).to(device)
            batch["names"] = torch.from_numpy(chunk.names[rows]).to(device)
            loss = losses_of(model, heads, batch, scene, diverse)
            optimizer.zero_grad()
            (loss["answers"] + recipe.naming_weight * loss["named"] + recipe.reconstruction_weight * loss["rebuilt"]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0:
                seconds = time.monotonic() - started
                shown = ", ".join(f"{name} {value.item():.4f}" for name, value in loss.items())
                print(f"step {step}/{steps} {seconds:.0f} s, {shown}", flush=True)
        if step % 640 == 0:
            save(model, tokenizer, recipe, out)
            parts = {"model": model, "heads": heads, "optimizer": optimizer}
            torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, state)
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
def evaluate(folder: pathlib.Path, seed: int, pictures: int = 300) -> dict[str, float]:
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
    parser.add_argument("--pictures", type=int, default=Recipe.pictures, help="scenes to train on")
    parser.add_argument("--threads", type=int, default=Recipe.threads, help="torch threads")
    parser.add_argument("--evaluate-only", action="store_true", help="measure exact match of the folder as it is")
    args = parser.parse_args()
    if not args.evaluate_only:
        train(Recipe(seed=args.seed, pictures=args.pictures, threads=args.threads), args.out)
    print(json.dumps(evaluate(args.out, args.seed), indent=2))


if __name__ == "__main__":
    main()
