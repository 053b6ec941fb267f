"""quant.py: int8 rows and 8-bit moments against a plain search for the nearest code, and the bounds they promise."""

import pytest
import torch

from allo_mini.quant import BLOCK, decode, dequantize_rows, dynamic_map, encode, quantize_rows


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- weights -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, block", [(256, 256), (512, 256), (24, 8), (96, 32), (7, 1), (1376, 32)])
def test_a_block_is_a_power_of_two_that_divides_the_row(width, block):
    weight = noise(5, width)
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (5, width // block)
    for row in range(5):
        for i in range(width // block):
            part = weight[row, i * block:(i + 1) * block]
            assert float(scale[row, i]) == pytest.approx(float(part.abs().max()) / 127, rel=1e-6)
            torch.testing.assert_close(codes[row, i * block:(i + 1) * block].float(), (part / scale[row, i]).round(),
                                       atol=1e-6, rtol=0)


def test_the_error_is_at_most_half_a_step():
    """In fp32; bf16 products add their own rounding of 2^-8 for the scale and the result together."""
    weight = noise(64, 512) * torch.logspace(-6, 3, 64)[:, None]
    codes, scale = quantize_rows(weight)
    step = scale.repeat_interleave(256, 1)
    error = (dequantize_rows(codes, scale, torch.float32) - weight).abs()
    assert (error <= step / 2 * 1.0001).all() and (error > step * 0.49).any()
    assert int(codes.abs().max()) == 127
    rounded = dequantize_rows(codes, scale, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - weight).abs() <= step / 2 + weight.abs() * 2.0 ** -7).all()


def test_what_is_selected_does_not_widen_a_block():
    weight, mask = noise(4, 512), torch.zeros(4, 512, dtype=torch.bool)
    mask[0, 3] = mask[2, 300] = mask[3, :256] = True
    alone = quantize_rows(weight, mask)[1]
    weight[mask] = 1e6
    codes, scale = quantize_rows(weight, mask)
    assert torch.equal(scale, alone) and scale.max() < 0.05
    assert (codes[mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_tiny_weights_survive(dtype):
    weight = torch.zeros(3, 256, dtype=dtype)
    weight[1] = 1e-20 * torch.arange(256)
    back = dequantize_rows(*quantize_rows(weight), dtype)
    assert back.isfinite().all() and not back[0].any() and not back[2].any()
    torch.testing.assert_close(back[1], weight[1], atol=2e-20, rtol=1e-2)


# ---- moments -----------------------------------------------------------------------------------------------

def nearest(values, signed):
    """The plain twin: each block by its own scale, each value the closest of all 256 codes."""
    out = []
    for block in values.split(BLOCK):
        scale = block.abs().max().clamp(min=1e-30)
        distance = (block / scale)[:, None] - dynamic_map(signed)[None]
        best = distance.abs().argmin(1)
        out.append(dynamic_map(signed)[best if signed else best.maximum((block > 0).long())] * scale)
    return torch.cat(out)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_ascending_codes_and_both_ends(signed):
    table = dynamic_map(signed)
    assert len(table) == len(table.unique()) == 256 and torch.equal(table, table.sort().values)
    assert float(table[-1]) == 1 and float(table[0]) == pytest.approx(-1 if signed else 0, abs=0.01)
    assert 0 in table.tolist()
    gaps = (table[1:] - table[:-1])[table[1:] > 0.1]
    assert gaps.max() < (0.015 if signed else 0.008) * 1.5


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_moments_come_back_as_the_nearest_codes(size, signed):
    """Over nine decades, sizes that are no multiple of a block included; a scale per 256 values."""
    values = noise(size, seed=size) * 10.0 ** (-9 * torch.rand(size, generator=torch.Generator().manual_seed(1)))
    values = values if signed else values.abs()
    codes, scale = encode(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape and scale.shape == (-(-size // BLOCK),)
    back = decode(codes, scale, signed)
    torch.testing.assert_close(back, nearest(values, signed), atol=0, rtol=1e-5)
    for block, got in zip(values.split(BLOCK), back.split(BLOCK)):
        top = float(block.abs().max())
        relative = ((got - block).abs() / block.abs())
        assert relative[block.abs() > 0.1 * top].max() < (0.09 if signed else 0.05)
        assert (got - block).abs().max() <= 0.01 * top
        assert got.abs().max() <= top * 1.0001


def test_what_is_not_zero_never_becomes_zero_in_the_unsigned_form():
    """A step is divided by it: 0 instead of 1e-12 would be a step of any size."""
    values = torch.logspace(-30, 0, 256)
    values[::5] = 0
    back = decode(*encode(values, False), False)
    assert torch.equal(back > 0, values > 0)
    assert (back >= values * 0.28).all()  # at worst, between the two smallest codes, a step grows 3.6-fold
    assert (back >= values * 0.6)[values > 1e-6].all()
    signed = decode(*encode(values, True), True)
    assert (signed[values < 1e-8] == 0).all()  # the signed form lets tiny momentum go


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_of_zeros_is_zeros_and_blocks_do_not_touch_each_other(signed):
    values = torch.cat((torch.zeros(BLOCK), torch.full((BLOCK,), 1e-20), torch.full((3,), 1e20)))
    back = decode(*encode(values, signed), signed)
    torch.testing.assert_close(back, values, atol=0, rtol=1e-6)
    assert encode(values, signed)[1].min() > 0
