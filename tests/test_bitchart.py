"""Bits as pictures: the figure and its table say what the format modules say."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import bitchart, formats, gguf_blocks


def test_number_table_holds_the_bits_and_the_error():
    value, scale = -0.15625, 0.05
    figure, table = bitchart.number(value, ["fp32", "bf16", "int4"], {"int4": scale})
    assert table.loc["bf16", "exponent"] == dict(formats.bit_fields(value, "bf16"))["exponent"]
    assert table.loc["int4", "stored value"] == pytest.approx(-3 * scale)
    assert table.loc["int4", "error"] == pytest.approx(abs(-3 * scale - value))
    shown = "".join(bit for bit in figure.data[0].text[0] if bit)
    assert shown == f"{int(np.float32(value).view(np.uint32)):032b}"
    assert "".join(bit for bit in figure.data[0].text[2] if bit) == "1101"


@pytest.mark.parametrize("name, width", [("q4_0", 16), ("q5_1", 16), ("tq1_0", 64), ("q4_k", 64), ("q6_k", 64)])
def test_block_draws_every_bit_in_file_order(name, width):
    form = gguf_blocks.layout(name)
    data = np.random.default_rng(0).integers(0, 256, form.size, dtype=np.uint8)
    data[[bit // 8 + 1 for bit in form.halves.values()]] = 0x3C  # keep the float16 fields finite
    figure, table = bitchart.block(data.tobytes(), name, width)
    drawn = "".join(bit for row in figure.data[0].text for bit in row if bit)
    assert drawn == "".join(map(str, np.unpackbits(data, bitorder="little")))
    values = {field.name: field.value for field in gguf_blocks.describe_block(data, name)}
    assert table["value"].to_dict() == values
    named = {trace.name for trace in figure.data[1:]}
    assert named >= set(form.halves) and named <= set(bitchart.COLOURS)
