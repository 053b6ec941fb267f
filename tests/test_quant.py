"""quant.py: int8 rows and 8-bit moments against plain twins, code by code, and their bounds."""

import pytest
import torch

from allo_mini.quant import BLOCK, decode, dequantize_rows, dynamic_map, encode, quantize_rows


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width, block", [(256, 256), (512, 256), (24, 8), (96, 32), (7, 1)])
def test_rows_are_the_nearest_codes_of_their_blocks(width, block):
    """A block is a power of two that divides the row; the error is at most half a step."""
    weight = noise(16, width) * torch.logspace(-20, 3, 16)[:, None]
    weight[3] = 0
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 127
    assert scale.dtype == torch.float32 and scale.shape == (16, width // block)
    step = scale.repeat_interleave(block, 1)
    exact = dequantize_rows(codes, scale, torch.float32)
    assert ((exact - weight).abs() <= step / 2 * 1.0001).all()
    rounded = dequantize_rows(codes, scale, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and not rounded[3].any()
    assert ((rounded.float() - weight).abs() <= step / 2 + weight.abs() * 2.0 ** -7).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_moments_come_back_as_the_nearest_codes(size, signed):
    """Over 25 decades; each block by its own scale, each value the closest of 256 codes."""
    table = dynamic_map(signed)
    assert torch.equal(table, table.unique()) and len(table) == 256 and table[-1] == 1
    values = noise(size) * 10.0 ** torch.linspace(-25, 0, size)[noise(size).argsort()]
    values = values if signed else values.abs()
    values[:: 7] = 0
    codes, scale = encode(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert scale.shape == (-(-size // BLOCK),) and scale.min() > 0
    for block, got in zip(values.split(BLOCK), decode(codes, scale, signed).split(BLOCK)):
        top = block.abs().max().clamp(min=1e-30)
        best = ((block / top)[:, None] - table).abs().argmin(1)
        best = best if signed else best.maximum((block > 0).long())
        torch.testing.assert_close(got, table[best] * top, atol=0, rtol=1e-5)
        assert (got - block).abs().max() <= 0.01 * top
        assert signed or torch.equal(got > 0, block > 0)  # a step is divided by it
