"""Pictures of one size."""

from __future__ import annotations

from pipeline.images import decode_image
from pipeline.records import Example
from stages.confirm.sizes import of_one_size
from tests.storage.submissions import picture


def test_of_one_size() -> None:
    def example(*sizes: tuple[int, int]) -> Example:
        images = tuple(picture(k, size) for k, size in enumerate(sizes))
        return Example(row=3, turn=1, prompt=(), answer="x", images=images)

    one, two = of_one_size([[example((10, 20)), example()], [example((30, 40), (50, 90))]])
    assert [decode_image(data).size for found in (*one, *two) for data in found.images] == [(30, 40)] * 3
    assert [(found.row, found.turn, len(found.images)) for found in (*one, *two)] == [(3, 1, 1), (3, 1, 0), (3, 1, 2)]
