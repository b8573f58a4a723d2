"""Configurations and processors of the families in `tests.families`: each takes a tokenizer and gives the two.

Models have a few layers, 48 wide, with their family's peculiarities: grouped queries, windows short enough to cut, capped logits,
sinks, tiles, several position axes, layers without attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf

from pipeline.embedded.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN

Batch = dict[str, torch.Tensor]

WIDTH, HEADS, GROUPS = 48, 6, 2
SIDE = 32
"""Of a square picture, pixels."""
WINDOW = 14
"""Tokens; longer than what follows the last picture, shorter than a picture."""


def text(kind: Any, tokenizer: Any, **more: Any) -> Any:
    """A tiny language tower's configuration: three layers, six heads of 8 dimensions in two groups."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    return kind(**{**settings, **more})


def tower(kind: Any, **more: Any) -> Any:
    """A tiny vision tower's configuration: 32 x 32 pixels in 16 patches."""
    settings: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return kind(**{**settings, **more})


def pictures(kind: Any, **more: Any) -> Any:
    """An image processor that makes 32 x 32 pixels."""
    return kind(**{"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **more})


def grid_tower(kind: Any, **more: Any) -> Any:
    """A tiny vision tower's configuration for pictures of any size: patches of 4 x 4 pixels, four of which make an image token."""
    settings = {
        "depth": 2,
        "hidden_size": WIDTH,
        "out_hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "patch_size": 4,
    }
    return kind(**{**settings, **more})


def patches(kind: Any, frames: int = 1) -> Any:
    """An image processor for `grid_tower`; `frames` as often does it count a picture's pixels."""
    size = {"shortest_edge": 256 * frames, "longest_edge": 4096 * frames}
    return pictures(kind, size=size, patch_size=4, temporal_patch_size=2, merge_size=2)


def llava(tokenizer: Any, language: Any = hf.LlamaConfig, **more: Any) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=tower(hf.CLIPVisionConfig, projection_dim=WIDTH),
        text_config=text(language, tokenizer, **more),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    processor = hf.LlavaProcessor(
        image_processor=pictures(hf.CLIPImageProcessorPil, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_mla(tokenizer: Any) -> tuple[Any, Any]:
    """DeepSeek's latent attention, as in Kimi's language tower: keys are wider than values."""
    return llava(
        tokenizer,
        hf.DeepseekV3Config,
        num_key_value_heads=HEADS,
        moe_intermediate_size=WIDTH,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )


class PlainProcessor:
    """Stands for a processor that needs torchvision: writes a picture's tokens where the chat template put its placeholder."""

    chat_template = CHAT_TEMPLATE

    def __init__(self, tokenizer: Any, placeholder: str, expand: Callable[[list[Any]], tuple[list[str], Batch]]) -> None:
        self.tokenizer = tokenizer
        self.placeholder = placeholder
        self.expand = expand

    def apply_chat_template(self, messages: Any, **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **more)

    def __call__(self, *, text: list[str], images: list[list[Any]] | None, **more: Any) -> Batch:
        tokens, tensors = self.expand([image for row in images or [] for image in row])
        pending = iter(tokens)
        filled = [re.sub(re.escape(self.placeholder), lambda _: next(pending), row) for row in text]
        return {**self.tokenizer(filled, **more), **tensors}


def pixels(images: list[Any]) -> torch.Tensor:
    """Pictures as float (pictures, 3, 32, 32), -1 to 1."""
    arrays = [np.asarray(image.convert("RGB").resize((SIDE, SIDE))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


GRIDS = [[32, 64], [64, 32]]


def llava_next(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=tower(hf.CLIPVisionConfig, projection_dim=WIDTH),
        text_config=text(hf.MistralConfig, tokenizer, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        image_grid_pinpoints=GRIDS,
        image_seq_length=16,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=pictures(
            hf.LlavaNextImageProcessorPil,
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=GRIDS,
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.LlavaOnevisionConfig(
        vision_config=tower(hf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(hf.Qwen2Config, tokenizer),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRIDS,
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=pictures(hf.LlavaOnevisionImageProcessorPil, image_grid_pinpoints=GRIDS),
        tokenizer=tokenizer,
        video_processor=None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return config, processor


QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def qwen(tokenizer: Any, config: Any, language: Any, vision: Any, processor: Any) -> tuple[Any, Any]:
    settings = config(
        text_config=language,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    return settings, processor(image_processor=patches(hf.Qwen2VLImageProcessorPil), tokenizer=tokenizer, video_processor=None)


def qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    vision = hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=2, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=2, mlp_ratio=2, patch_size=4
    )
    language = text(hf.Qwen2VLTextConfig, tokenizer, rope_parameters=dict(ROPE))
    return qwen(tokenizer, hf.Qwen2VLConfig, language, vision, hf.Qwen2VLProcessor)


def qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    kind = hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig
    vision = grid_tower(kind, window_size=16, fullatt_block_indexes=[1])
    language = text(
        hf.Qwen2_5_VLTextConfig,
        tokenizer,
        rope_parameters=dict(ROPE),
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )
    return qwen(tokenizer, hf.Qwen2_5_VLConfig, language, vision, hf.Qwen2_5_VLProcessor)


def qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    kind = hf.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig
    vision = grid_tower(kind, num_position_embeddings=64, deepstack_visual_indexes=[0])
    language = text(hf.Qwen3VLTextConfig, tokenizer, rope_parameters=dict(ROPE), head_dim=8)
    return qwen(tokenizer, hf.Qwen3VLConfig, language, vision, hf.Qwen3VLProcessor)


def qwen3_5(tokenizer: Any) -> tuple[Any, Any]:
    vision = grid_tower(hf.models.qwen3_5.configuration_qwen3_5.Qwen3_5VisionConfig, num_position_embeddings=64)
    language = text(
        hf.Qwen3_5TextConfig,
        tokenizer,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        head_dim=8,
        rope_parameters={**ROPE, "partial_rotary_factor": 1.0},
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    return qwen(tokenizer, hf.Qwen3_5Config, language, vision, hf.Qwen3VLProcessor)


INTERN_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def internvl(tokenizer: Any, language: Any = hf.Qwen2Config, **more: Any) -> tuple[Any, Any]:
    config = hf.InternVLConfig(
        vision_config=tower(hf.InternVLVisionConfig, image_size=[32, 32], patch_size=[4, 4]),
        text_config=text(language, tokenizer, **more),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=16,
    )
    processor = hf.InternVLProcessor(
        image_processor=pictures(hf.GotOcr2ImageProcessorPil, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer=tokenizer,
        video_processor=None,
        image_seq_length=16,
    )
    return config, processor


def internvl_gpt_oss(tokenizer: Any) -> tuple[Any, Any]:
    return internvl(
        tokenizer,
        hf.GptOssConfig,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


IDEFICS_TOKENS = {
    "a": "<fake_token_around_image>",
    "b": "<end_of_utterance>",
    "c": "<global-img>",
    "d": "<row_1_col_1>",
    "e": "<row_1_col_2>",
}


def idefics3(tokenizer: Any, config: Any, vision: Any, images: Any) -> tuple[Any, Any]:
    """Idefics3 and SmolVLM, whose own processor differs in videos alone, and needs num2words."""
    settings = config(
        vision_config=tower(vision, patch_size=4),
        text_config=text(hf.LlamaConfig, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        scale_factor=2,
    )
    tiles = pictures(images, size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    return settings, hf.Idefics3Processor(tiles, tokenizer, image_seq_len=16)


def paligemma(tokenizer: Any, language: Any = hf.GemmaConfig, **more: Any) -> tuple[Any, Any]:
    image_processor = pictures(hf.SiglipImageProcessorPil)
    image_processor.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(image_processor, tokenizer)  # adds its own tokens
    config = hf.PaliGemmaConfig(
        vision_config=tower(hf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(language, tokenizer, head_dim=8, **more),
        image_token_index=processor.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=len(tokenizer),
    )
    return config, processor


def paligemma2(tokenizer: Any) -> tuple[Any, Any]:
    return paligemma(
        tokenizer,
        hf.Gemma2Config,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def gemma3(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.Gemma3Config(
        vision_config=tower(hf.SiglipVisionConfig, vision_use_head=False, patch_size=4),
        text_config=text(
            hf.Gemma3TextConfig,
            tokenizer,
            head_dim=8,
            query_pre_attn_scalar=4,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = hf.Gemma3Processor(pictures(hf.Gemma3ImageProcessorPil), tokenizer, image_seq_length=16)
    return config, processor


def mistral3(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.Mistral3Config(
        vision_config=tower(hf.PixtralVisionConfig, patch_size=4, image_size=64, head_dim=WIDTH // 2),
        text_config=text(hf.MistralConfig, tokenizer, head_dim=8, sliding_window=WINDOW),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    resize = pictures(hf.PixtralImageProcessorPil, size={"longest_edge": 64}, patch_size=8)

    def expand(images: list[Any]) -> tuple[list[str], Batch]:
        made = dict(resize(images, return_tensors="pt"))
        rows = [("[IMG]" * (int(width) // 8) + "[IMG_BREAK]") * (int(height) // 8) for height, width in made["image_sizes"]]
        return [row.removesuffix("[IMG_BREAK]") + "[IMG_END]" for row in rows], made

    return config, PlainProcessor(tokenizer, "[IMG]", expand)


def lfm2_vl(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, patch_size=4, num_patches=64
        ),
        text_config=text(
            hf.Lfm2Config,
            tokenizer,
            num_hidden_layers=4,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_multiple_of=8,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_size=WIDTH,
        downsample_factor=2,
    )

    def expand(images: list[Any]) -> tuple[list[str], Batch]:
        cut = pixels(images).unfold(2, 4, 4).unfold(3, 4, 4)  # (pictures, 3, 8, 8, 4, 4)
        patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 64, 48)
        shapes = torch.tensor([[8, 8]] * len(images))
        made = {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2]).long(), "spatial_shapes": shapes}
        return [IMAGE_TOKEN * 16] * len(images), made

    return config, PlainProcessor(tokenizer, IMAGE_TOKEN, expand)


def llama4(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.Llama4Config(
        vision_config=tower(
            hf.Llama4VisionConfig,
            patch_size=4,
            intermediate_size=4 * WIDTH,
            vision_output_dim=WIDTH,
            projector_input_dim=WIDTH,
            projector_output_dim=WIDTH,
        ),
        text_config=text(
            hf.Llama4TextConfig,
            tokenizer,
            head_dim=8,
            intermediate_size_mlp=WIDTH,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )

    def expand(images: list[Any]) -> tuple[list[str], Batch]:
        return [IMAGE_TOKEN * 16] * len(images), {"pixel_values": pixels(images)}

    return config, PlainProcessor(tokenizer, IMAGE_TOKEN, expand)


def aya_vision(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.AyaVisionConfig(
        vision_config=tower(hf.SiglipVisionConfig, vision_use_head=False, patch_size=4),
        text_config=text(
            hf.Cohere2Config,
            tokenizer,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    processor = hf.AyaVisionProcessor(
        image_processor=pictures(hf.GotOcr2ImageProcessorPil, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer=tokenizer,
        patch_size=4,
        img_size=32,
        downsample_factor=2,
    )
    return config, processor


def glm4v(tokenizer: Any) -> tuple[Any, Any]:
    config = hf.Glm4vConfig(
        vision_config=grid_tower(hf.models.glm4v.configuration_glm4v.Glm4vVisionConfig, image_size=32),
        text_config=text(hf.Glm4vTextConfig, tokenizer, rope_parameters={**ROPE, "partial_rotary_factor": 1.0}),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_start_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_image|>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<|end_of_image|>"),
    )
    images = patches(hf.Glm4vImageProcessorPil, frames=2)
    return config, hf.Glm4vProcessor(image_processor=images, tokenizer=tokenizer, video_processor=None)


def ovis2(tokenizer: Any) -> tuple[Any, Any]:
    names = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    config = hf.Ovis2Config(
        vision_config=tower(hf.models.ovis2.configuration_ovis2.Ovis2VisionConfig, vocab_size=24, hidden_stride=1),
        text_config=text(hf.Qwen2Config, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(names),
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )
    images = pictures(hf.Ovis2ImageProcessorPil, crop_to_patches=True, min_patches=1, max_patches=2)
    return config, hf.Ovis2Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=16)
