"""Slow twins of kernels/renorm.py, one number at a time."""

import math

import numpy as np

f32 = np.float32


def fused(x, total):
    """x * x + total with one rounding; the product of two float32 is exact in float64."""
    return f32(np.float64(x) * np.float64(x) + np.float64(total))


def row_norm(row_D, p):
    """The p-norm in float32, added up as torch's CPU kernels do it on x86."""
    size = [abs(f32(x)) for x in row_D]
    if p == 0:
        return f32(sum(x != 0 for x in size))
    if math.isinf(p):
        return f32(np.max(size) if p > 0 else np.min(size))
    if len(size) == 1:
        return size[0]
    total = f32(0.0)
    if p == 2:
        whole, fours = len(size) // 8 * 8, len(size) // 4 * 4
        for lane in range(8):
            in_lane = f32(0.0)
            for x in size[lane:whole:8]:
                in_lane += x * x
            total = total + in_lane if lane else in_lane
        for x in size[whole:fours]:
            total += x * x
        for x in size[fours:]:
            total = fused(x, total)
        return np.sqrt(total)
    if p == 1:
        for x in size:
            total += x
        return total
    for x in size:
        total += f32(np.float64(x) ** np.float64(f32(p)))
    return f32(np.float64(total) ** np.float64(f32(1) / f32(p)))


def row_scales(rows_UD, max_norm, norm_type):
    """What each row that is longer than max_norm is to be multiplied by; 1 for others."""
    scales = []
    for row_D in rows_UD:
        norm = float(row_norm(row_D, norm_type))
        scales.append(f32(np.float64(max_norm) / (norm + 1e-7)) if norm > max_norm else f32(1.0))
    return np.array(scales, np.float32)


def scale_weights(rows_UE, scale_U, dim):
    """The first dim values of each row times its scale."""
    scaled = rows_UE.copy()
    for u in range(len(scaled)):
        for d in range(dim):
            scaled[u, d] = f32(scaled[u, d] * scale_U[u])
    return scaled
