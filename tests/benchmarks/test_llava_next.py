"""The embedded base as a LLaVA-NeXT: the same weights, and tokens by the picture's shape."""

from __future__ import annotations

import pathlib

import pytest
import torch
from PIL import Image

from benchmarks.llava_next import main
from pipeline.models import EMBEDDED_BASE, load_base


def test_the_same_weights_in_tiles(tmp_path: pathlib.Path) -> None:
    assert main([str(tmp_path / "base")]) == 0
    plain, _ = load_base(EMBEDDED_BASE, dtype="float32")
    model, processor = load_base(tmp_path / "base", dtype="float32")
    weights = model.state_dict()
    assert {name: bool((value == weights[name]).all()) for name, value in plain.state_dict().items()} == dict.fromkeys(
        plain.state_dict(), True
    )
    assert {*weights} - {*plain.state_dict()} == {"model.image_newline"}
    assert not weights["model.image_newline"].any()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], add_generation_prompt=True
    )
    for size, expected in (((64, 64), 136), ((128, 64), 200), ((64, 40), 168)):
        inputs = processor(images=[Image.new("RGB", size)], text=[prompt], return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == expected
        with torch.inference_mode():
            assert model(**inputs).logits.isfinite().all()


def test_where_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "out" in capsys.readouterr().err
