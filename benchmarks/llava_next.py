"""The embedded base in another family's layout: a LLaVA-NeXT folder of its weights, to try the line on what it was not made with.

    python -m benchmarks.llava_next llava-next
    python -m benchmarks run detection --base llava-next --seeds 1 --only attack=badnet --only rate=0.1 --out bench-next

A picture is shown whole and again in tiles of 64 pixels, and every row of tokens of the tiles ends with a token that the base has
not learnt and that starts at 0: a square picture of 64 pixels takes 136 image tokens in the place of 64, another shape others.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor

from pipeline.embedded.build import PATCH
from pipeline.embedded.scenes import SIZE
from pipeline.models import EMBEDDED_BASE, load_base

GRIDS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
"""Heights and widths that pictures are resized to for the tiles, pixels."""


def build(out: pathlib.Path) -> None:
    """Write the folder."""
    model, processor = load_base(EMBEDDED_BASE, dtype="float32")
    config = LlavaNextConfig(
        **{name: getattr(model.config, name) for name in ("vision_config", "text_config", "image_token_index", "pad_token_id")},
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_grid_pinpoints=GRIDS,
        image_seq_length=model.config.image_seq_length,
        tie_word_embeddings=False,
    )
    tiled = LlavaNextForConditionalGeneration(config)
    tiled.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        tiled.model.image_newline.zero_()
    tiled.generation_config = model.generation_config
    tiled.save_pretrained(out)
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=GRIDS,
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
    )
    LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
    ).save_pretrained(out)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llava_next", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("out", type=pathlib.Path)
    build(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
