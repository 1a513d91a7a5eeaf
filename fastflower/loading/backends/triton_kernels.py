"""Triton kernels that render a batch on a GPU: `warp` and then `color`, or `render` alone. No other file imports triton.

They perform the same steps as `kernel.c`: box averaging, blur, bilinear interpolation, brightness, contrast, saturation,
hue and normalization, but without intermediate rounding. Their parameters come in two tables with one row per sample.
"""
# pyright: standard
# Triton compiles kernels from their source, which has no type annotations.

from typing import Any

import triton
import triton.language as tl

# Columns of the integer table, (N, WHOLE) int64. HEIGHT and WIDTH count boxes of BOX_DOWN x BOX_ACROSS pixels.
WHOLE = 14  # an even number of columns keeps both tables 16-byte aligned for any N
ADDRESS, STRIDE, HEIGHT, WIDTH, BOX_DOWN, BOX_ACROSS, REACH_DOWN, REACH_ACROSS, MASKED = range(9)
ERASE = 9  # top, left, height, width
GRAY = 13
# Columns of the float table, (N, FRACTIONS) float32.
FRACTIONS = 28
WARP, FRAME, BLUR_DOWN, BLUR_ACROSS = 0, 6, 12, 18  # six each; blur weights go from the center outward, then a zero
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(24, 28)  # in the order of color.FACTORS
# Bits that select the steps after the warp. Steps that the augmentation never uses are not compiled.
SATURATES, TURNS, ERASES, NORMALIZES, GRAYS = 1, 2, 4, 8, 16

_c: Any = tl.constexpr
_jit: Any = triton.jit  # its type stubs do not cover kernel launches
_WHOLE, _FRACTIONS = _c(WHOLE), _c(FRACTIONS)
_ADDRESS, _STRIDE, _HEIGHT, _WIDTH, _MASKED = map(_c, (ADDRESS, STRIDE, HEIGHT, WIDTH, MASKED))
_ERASE, _GRAY = map(_c, (ERASE, GRAY))
_BOX_DOWN, _BOX_ACROSS, _REACH_DOWN, _REACH_ACROSS = map(_c, (BOX_DOWN, BOX_ACROSS, REACH_DOWN, REACH_ACROSS))
_WARP, _FRAME, _BLUR_DOWN, _BLUR_ACROSS = map(_c, (WARP, FRAME, BLUR_DOWN, BLUR_ACROSS))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = map(_c, (BRIGHTNESS, CONTRAST, SATURATION, HUE))
_SATURATES, _TURNS, _ERASES, _NORMALIZES, _GRAYS = map(_c, (SATURATES, TURNS, ERASES, NORMALIZES, GRAYS))


@_jit
def _clamp(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@_jit
def _luma(r, g, b):
    """Return the ITU-R BT.601 luma, with the weights of color.LUMA."""
    return 0.299 * r + 0.587 * g + 0.114 * b


@_jit
def _rgb(word):
    return (word & 255).to(tl.float32), ((word >> 8) & 255).to(tl.float32), ((word >> 16) & 255).to(tl.float32)


@_jit
def _pixels(BLOCK: tl.constexpr, W: tl.constexpr):
    """Return the output pixels that this program writes, as (sample, pixel numbers, rows, columns)."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1), pixel, pixel // W, pixel % W


@_jit
def _interpolated(image, stride, height, width, x, y):
    """Return the bilinear interpolation (r, g, b) of the image at the points (x, y)."""
    x0 = x.to(tl.int32)
    y0 = y.to(tl.int32)
    across = x - x0
    down = y - y0
    x1 = tl.minimum(x0 + 1, width - 1)
    upper = image + y0 * stride
    lower = image + tl.minimum(y0 + 1, height - 1) * stride
    r00, g00, b00 = _rgb(tl.load(upper + x0))
    r01, g01, b01 = _rgb(tl.load(upper + x1))
    r10, g10, b10 = _rgb(tl.load(lower + x0))
    r11, g11, b11 = _rgb(tl.load(lower + x1))
    w00 = (1 - down) * (1 - across)
    w01 = (1 - down) * across
    w10 = down * (1 - across)
    w11 = down * across
    r = w00 * r00 + w01 * r01 + w10 * r10 + w11 * r11
    g = w00 * g00 + w01 * g01 + w10 * g10 + w11 * g11
    b = w00 * b00 + w01 * b01 + w10 * b10 + w11 * b11
    return r, g, b


@_jit
def _tap(weights, step, share):
    """Return tap `step` of the combined filter for blur and interpolation. share  Interpolation weight of the next pixel."""
    near = tl.load(weights + tl.maximum(step, -step))
    far = tl.load(weights + tl.maximum(step - 1, 1 - step))
    return (1 - share) * near + share * far


@_jit
def _filtered(image, stride, height, width, x, y, fractions, reach_down, reach_across, box_down, box_across):
    """Average over boxes, blur, and interpolate at the points (x, y), given in units of boxes. Return (r, g, b)."""
    x0 = x.to(tl.int32)
    y0 = y.to(tl.int32)
    across = x - x0
    down = y - y0
    r = tl.zeros_like(x)
    g = tl.zeros_like(x)
    b = tl.zeros_like(x)
    # `while` compiles to the same code as `for`. With numpy 2.5, range() rejects tensors in Triton 3.6's interpreter.
    i = -reach_down
    while i < reach_down + 2:
        weight_down = _tap(fractions + _BLUR_DOWN, i, down)
        top = _clamp(y0 + i, 0, height - 1) * box_down
        j = -reach_across
        while j < reach_across + 2:
            weight = weight_down * _tap(fractions + _BLUR_ACROSS, j, across)
            left = _clamp(x0 + j, 0, width - 1) * box_across
            k = 0
            while k < box_down:
                m = 0
                while m < box_across:
                    red, green, blue = _rgb(tl.load(image + (top + k) * stride + left + m))
                    r += weight * red
                    g += weight * green
                    b += weight * blue
                    m += 1
                k += 1
            j += 1
        i += 1
    share = 1.0 / (box_down * box_across)
    return r * share, g * share, b * share


@_jit
def _sampled(whole, fractions, row, column):
    """Sample the image where the warp maps output pixels (row, column), and return (r, g, b) in 0 .. 255."""
    image = tl.load(whole + _ADDRESS).to(tl.pointer_type(tl.int32))
    stride = tl.load(whole + _STRIDE)
    height = tl.load(whole + _HEIGHT).to(tl.int32)
    width = tl.load(whole + _WIDTH).to(tl.int32)
    box_down = tl.load(whole + _BOX_DOWN).to(tl.int32)
    box_across = tl.load(whole + _BOX_ACROSS).to(tl.int32)
    reach_down = tl.load(whole + _REACH_DOWN).to(tl.int32)
    reach_across = tl.load(whole + _REACH_ACROSS).to(tl.int32)
    warp = fractions + _WARP
    x = _clamp(tl.load(warp) * column + (tl.load(warp + 1) * row + tl.load(warp + 2)), 0.0, width - 1.0)
    y = _clamp(tl.load(warp + 3) * column + (tl.load(warp + 4) * row + tl.load(warp + 5)), 0.0, height - 1.0)
    if reach_down + reach_across + box_down + box_across == 2:  # neither blur nor boxes
        r, g, b = _interpolated(image, stride, height, width, x, y)
    else:
        r, g, b = _filtered(
            image, stride, height, width, x, y, fractions, reach_down, reach_across, box_down, box_across
        )
    return r, g, b


@_jit
def _inside(place, size):
    """Return the share of each output pixel inside a frame of `size`. It falls from 1 to 0 over one pixel at the edges."""
    return _clamp(tl.minimum(place + 1, size - place), 0.0, 1.0)


@_jit
def _warped(whole, fractions, row, column, H: tl.constexpr, W: tl.constexpr):
    """Sample the image, black out everything outside the visible part, and apply brightness."""
    r, g, b = _sampled(whole, fractions, row, column)
    factor = tl.zeros_like(r) + tl.load(fractions + _BRIGHTNESS)
    if tl.load(whole + _MASKED) != 0:
        frame = fractions + _FRAME
        u = tl.load(frame) * column + (tl.load(frame + 1) * row + tl.load(frame + 2))
        v = tl.load(frame + 3) * column + (tl.load(frame + 4) * row + tl.load(frame + 5))
        factor *= _inside(u, W) * _inside(v, H)
    return tl.minimum(r * factor, 255.0), tl.minimum(g * factor, 255.0), tl.minimum(b * factor, 255.0)


@_jit
def _ramp(hue, center, offset, sign):
    """Return one channel of a hue: clamp(d - 1, 0, 1) or clamp(2 - d, 0, 1), d = |hue - center| (Wikipedia, "HSL and HSV")."""
    return _clamp(tl.abs(hue - center) * sign + offset, 0.0, 1.0)


@_jit
def _turned(r, g, b, turns):
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    chroma = high - low
    scale = 1.0 / tl.maximum(chroma, 1e-6)
    hue = (r - g) * scale + 4.0
    hue = tl.where(g == high, (b - r) * scale + 2.0, hue)
    hue = tl.where(r == high, (g - b) * scale, hue)
    hue += 6.0 * turns
    hue -= 6.0 * tl.floor(hue / 6.0)
    return (
        low + chroma * _ramp(hue, 3.0, -1.0, 1.0),
        low + chroma * _ramp(hue, 2.0, 2.0, -1.0),
        low + chroma * _ramp(hue, 4.0, 2.0, -1.0),
    )


@_jit
def _written(out, n, pixel, valid, r, g, b, H: tl.constexpr, W: tl.constexpr):
    """Store the three channels of the pixels, rounded to integers if the output is uint8."""
    place = out + (n.to(tl.int64) * (H * W) + pixel) * 3
    if out.dtype.element_ty == tl.uint8:
        r = tl.floor(r + 0.5)
        g = tl.floor(g + 0.5)
        b = tl.floor(b + 0.5)
    tl.store(place, r.to(out.dtype.element_ty), mask=valid)
    tl.store(place + 1, g.to(out.dtype.element_ty), mask=valid)
    tl.store(place + 2, b.to(out.dtype.element_ty), mask=valid)


@_jit
def _colored(
    whole, fractions, row, column, r, g, b, constants,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Apply saturation, hue, grayscale, normalization and erasing.

    constants  Three factors, three offsets, three erase values.
    """
    if _SATURATES & STEPS:
        saturation = tl.load(fractions + _SATURATION)
        gray = (1 - saturation) * _luma(r, g, b)
        r = _clamp(saturation * r + gray, 0.0, 255.0)
        g = _clamp(saturation * g + gray, 0.0, 255.0)
        b = _clamp(saturation * b + gray, 0.0, 255.0)
    if _TURNS & STEPS:
        r, g, b = _turned(r, g, b, tl.load(fractions + _HUE))
    if _GRAYS & STEPS:
        grays = tl.load(whole + _GRAY) != 0
        level = _luma(r, g, b)
        r = tl.where(grays, level, r)
        g = tl.where(grays, level, g)
        b = tl.where(grays, level, b)
    if _NORMALIZES & STEPS:
        r = r * tl.load(constants) + tl.load(constants + 3)
        g = g * tl.load(constants + 1) + tl.load(constants + 4)
        b = b * tl.load(constants + 2) + tl.load(constants + 5)
    if _ERASES & STEPS:
        top = tl.load(whole + _ERASE)
        left = tl.load(whole + _ERASE + 1)
        below = (row >= top) & (row < top + tl.load(whole + _ERASE + 2))
        hit = below & (column >= left) & (column < left + tl.load(whole + _ERASE + 3))
        r = tl.where(hit, tl.load(constants + 6), r)
        g = tl.where(hit, tl.load(constants + 7), g)
        b = tl.where(hit, tl.load(constants + 8), b)
    return r, g, b


@_jit
def warp(
    whole, fractions, planes, grays, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Warp images into `planes`, (N, 3, H, W) float16, and sum their gray values. Used with `color` for contrast jitter.

    grays  (N, blocks) float32: one sum per block, so that the mean does not depend on which block runs first.
    """
    n, pixel, row, column = _pixels(BLOCK, W)
    valid = pixel < H * W
    r, g, b = _warped(whole + n * _WHOLE, fractions + n * _FRACTIONS, row, column, H, W)
    place = planes + n.to(tl.int64) * (3 * H * W) + pixel
    tl.store(place, r.to(tl.float16), mask=valid)
    tl.store(place + H * W, g.to(tl.float16), mask=valid)
    tl.store(place + 2 * H * W, b.to(tl.float16), mask=valid)
    gray = tl.sum(tl.where(valid, _luma(r, g, b), 0.0), axis=0)
    tl.store(grays + n * tl.num_programs(0) + tl.program_id(0), gray)


@_jit
def color(
    whole, fractions, planes, grays, constants, out,
    H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Apply contrast about the mean gray, then the later steps, and write to `out`, (N, H, W, 3). Runs after `warp`."""
    n, pixel, row, column = _pixels(BLOCK, W)
    valid = pixel < H * W
    place = planes + n.to(tl.int64) * (3 * H * W) + pixel
    r = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(place + H * W, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(place + 2 * H * W, mask=valid, other=0.0).to(tl.float32)
    blocks = tl.num_programs(0)
    numbers = tl.arange(0, BLOCKS)
    mean = tl.sum(tl.load(grays + n * blocks + numbers, mask=numbers < blocks, other=0.0), axis=0) / (H * W)
    contrast = tl.load(fractions + n * _FRACTIONS + _CONTRAST)
    base = (1 - contrast) * mean
    r = _clamp(contrast * r + base, 0.0, 255.0)
    g = _clamp(contrast * g + base, 0.0, 255.0)
    b = _clamp(contrast * b + base, 0.0, 255.0)
    r, g, b = _colored(whole + n * _WHOLE, fractions + n * _FRACTIONS, row, column, r, g, b, constants, STEPS)
    _written(out, n, pixel, valid, r, g, b, H, W)


@_jit
def render(
    whole, fractions, constants, out,
    H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Apply warp and color in one kernel. Used if there is no contrast jitter."""
    n, pixel, row, column = _pixels(BLOCK, W)
    valid = pixel < H * W
    r, g, b = _warped(whole + n * _WHOLE, fractions + n * _FRACTIONS, row, column, H, W)
    r, g, b = _colored(whole + n * _WHOLE, fractions + n * _FRACTIONS, row, column, r, g, b, constants, STEPS)
    _written(out, n, pixel, valid, r, g, b, H, W)
