"""The attention table as arrays refuses what the stages after it could not use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import StageError
from stages.extract.table import AttentionTable


def plain_table(count: int = 3, **change: Any) -> pa.Table:
    """Records of a model of 2 layers with 2 heads."""
    columns: dict[str, Any] = {
        "row": list(range(10, 10 + count)),
        "turn": [0] * count,
        "question": ["what?"] * count,
        "answer": ["x"] * count,
        "image_tokens": [4] * count,
        "layers": [2] * count,
        "heads": [2] * count,
        "entropy": [[1.0, 1.5]] * count,
        **{name: [[0.1, 0.2, 0.3, 0.4]] * count for name in ("head_entropy", "image_share", "ratio")},
    }
    return pa.table({**columns, **change})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["entropy", "head_entropy", "image_share", "ratio"])
def test_values_that_are_not_finite_name_their_row(name: str, value: float) -> None:
    values = [list(row) for row in plain_table()[name].to_pylist()]
    values[1][-1] = value
    with pytest.raises(StageError, match=f"row 11: its {name} is not finite"):
        AttentionTable.from_arrow(plain_table(3, **{name: values}))


def test_tables_of_two_models_are_refused() -> None:
    mixed = plain_table(layers=[2, 2, 1], heads=[2, 2, 4])
    with pytest.raises(StageError, match=r"mixes models.*\(1, 4\), \(2, 2\)"):
        AttentionTable.from_arrow(mixed)
    text_only = plain_table(layers=[2, 0, 2], heads=[2, 0, 2], image_tokens=[4, 0, 4])
    assert AttentionTable.from_arrow(text_only).row.tolist() == [10, 12]


def test_chunks_are_read_one_after_the_other() -> None:
    """Of more than 2^31 values together no array of lists can be made."""
    values = [[[float(row), float(row), 0.0, 1.0]] for row in range(4)]
    columns = plain_table(4).to_pydict() | {"image_tokens": [4, 0, 4, 4]}
    parts = [pa.table({**columns, "ratio": [value[0] for value in values]}).slice(start, 2) for start in (0, 2)]
    found = AttentionTable.from_arrow(pa.concat_tables(parts))
    assert found.ratio[:, 0].tolist() == [[0, 0], [2, 2], [3, 3]]
    assert found.ratio.dtype == np.float32
