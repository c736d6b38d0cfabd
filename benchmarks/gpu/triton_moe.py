"""The experts of a layer as Triton frameworks run them: rows are sorted by expert and padded to
whole tiles without waiting for the device, one kernel gathers and multiplies for both matmuls, the
weights are applied in the second, and sums are taken over the slots.

Written after the published design of vLLM's fused_moe: it stands for it where vLLM cannot be
installed, with one choice of tile by rows for each expert and no tuned tables.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _grouped(
    rows, weight, result, order, expert_of, count, scale,
    N: tl.constexpr, D: tl.constexpr, per_row: tl.constexpr, weighted: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of result[order] = rows[order / per_row] · weight[expert]ᵀ."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.num_programs(0) // blocks_n
    # Tiles in groups of rows, so that those that run together share weights in L2.
    program = tl.program_id(0)
    group = program // (GROUP * blocks_n)
    first = group * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    block_m = first + (program % (GROUP * blocks_n)) % height
    block_n = (program % (GROUP * blocks_n)) // height
    expert = tl.load(expert_of + block_m).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(order + block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = place < count
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = rows + (place[:, None] // per_row) * D + k[None, :]
    right = weight + expert * N * D + n[None, :] * D + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_K)):
        inside = k < D - step * BLOCK_K
        a = tl.load(left, mask=real[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & (n[None, :] < N), other=0.0)
        total += tl.dot(a, b)
        left += BLOCK_K
        right += BLOCK_K
    if weighted:
        total *= tl.load(scale + place, mask=real, other=0.0)[:, None]
    to = result + place[:, None] * N + n[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=real[:, None] & (n[None, :] < N))


def _align(ids, experts, block):
    """Places in ids by expert, each expert's padded to whole blocks, and the expert of each block;
    sizes follow from the shape of ids alone."""
    flat, count = ids.flatten(), ids.numel()
    most = (count + block - 1) // block + min(count, experts)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    ends = ((counts + block - 1) // block).cumsum(0)
    starts = counts.cumsum(0) - counts
    padded = torch.full((most * block,), count, dtype=torch.int32, device=ids.device)
    sorted_ids = flat[order].long()
    begin = (ends - (counts + block - 1) // block) * block
    at = begin[sorted_ids] + torch.arange(count, device=ids.device) - starts[sorted_ids]
    padded[at] = order.to(torch.int32)
    blocks = torch.arange(most, device=ids.device)
    of = torch.searchsorted(ends, blocks, right=True)
    return padded, torch.where(of < experts, of, -1).to(torch.int32)


def experts(x, ids, weights, gate_up, down):
    """x [T, H], ids and weights [T, K], gate_up [E, 2F, H], down [E, H, F]."""
    T, K = ids.shape
    E, width, H = gate_up.shape
    per_expert = max(1, T * K // E)
    block = 16 if per_expert <= 16 else 64 if per_expert <= 128 else 128
    order, expert_of = _align(ids, E, block)
    tile = {"BLOCK_M": block, "BLOCK_N": 128 if block > 16 else 64, "BLOCK_K": 64, "GROUP": 8}
    tile |= {"num_warps": 8 if block == 128 else 4, "num_stages": 3}
    count = T * K

    def launch(rows, weight, out, per_row, weighted):
        N, D = weight.shape[1:]
        grid = (len(expert_of) * triton.cdiv(N, tile["BLOCK_N"]),)
        scale = weights.flatten()
        _grouped[grid](
            rows, weight, out, order, expert_of, count, scale, N, D, per_row, weighted, **tile
        )
        return out

    both = launch(x, gate_up, x.new_empty(count, width), K, False)
    gate, up = both.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return launch(hidden, down, x.new_empty(count, H), 1, True).view(T, K, H).sum(1)
