"""Ridge regression with leave-one-group-out against a solve of every group's own size, and its weights' difference.

    python bench/ridge.py --n 20000 --d 1024 --largest 4000

Both fit the same 29 strengths from one eigendecomposition; the peer solves a g x g system for a group of g rows.
"""

import argparse
import time
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from img2prompt.model_a import ridge as module


def by_group_size(self: module._Basis, residual: Tensor, shrink: Tensor) -> None:
    for rows, left in self.sizes.views(self.rows, residual):
        hat = (rows * shrink) @ rows.mT + self.intercept
        left.copy_(torch.linalg.solve(torch.eye(rows.shape[1], dtype=hat.dtype) - hat, left))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--largest", type=int, default=4000)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    groups = np.concatenate([np.zeros(args.largest, int), 1 + np.arange(args.n - args.largest) // 3])
    x = rng.standard_normal((args.n, args.d), dtype=np.float32)
    y = x @ rng.standard_normal((args.d, 384), dtype=np.float32) / args.d**0.5 + rng.standard_normal((args.n, 384))
    features, targets = torch.from_numpy(x), torch.nn.functional.normalize(torch.from_numpy(y.astype(np.float32)))
    start = time.perf_counter()
    ours = module.ridge(features, targets, groups)
    fast = time.perf_counter() - start
    print(f"{'ours':24} {fast:8.1f} s", flush=True)
    with mock.patch.object(module._Basis, "leave_out", by_group_size):
        start = time.perf_counter()
        theirs = module.ridge(features, targets, groups)
        slow = time.perf_counter() - start
    difference = float((ours.weight - theirs.weight).abs().max())
    print(f"{'a solve of g x g':24} {slow:8.1f} s  ours is {slow / fast:.1f} times as fast")
    print(f"weights differ by {difference:.1e} at most, strengths {ours.strength:.0f} and {theirs.strength:.0f}")
