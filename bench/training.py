"""A training step of Model A's tower on a CPU against timm's own modules: interleaved runs, medians, ratios, deviation.

python bench/training.py --layers 5 --side 4 --runs 7
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from img2prompt.clip import efficientnet
from img2prompt.sample import small_clip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5, help="of the tower, from its end")
    parser.add_argument("--side", type=int, default=4, help="of the last maps: the images' over 32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    trunk = small_clip.untrained("lite0", 0, 32 * args.side)[0].visual.trunk
    blocks = [block for stage in trunk.blocks for block in stage]
    head = nn.Sequential(trunk.conv_head, trunk.bn2, trunk.global_pool)
    towers = {
        "timm's modules": nn.Sequential(nn.Sequential(trunk.conv_stem, trunk.bn1), *blocks, head)[-args.layers :],
        "as we train it": nn.Sequential(*efficientnet.layers(copy.deepcopy(trunk)))[-args.layers :],
    }
    with torch.no_grad():
        images = torch.randn(args.batch, 3, 32 * args.side, 32 * args.side)
        frozen = nn.Sequential(*efficientnet.layers(trunk))[: -args.layers]
        x = frozen.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    target = nn.functional.normalize(torch.randn(args.batch, trunk.num_features), dim=1)
    optimisers = {
        name: torch.optim.AdamW(tower.to(memory_format=torch.channels_last).parameters(), lr=1e-4)
        for name, tower in towers.items()
    }
    gradients = []
    for tower in towers.values():
        (1 - nn.functional.cosine_similarity(tower(x), target)).mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tower.parameters()]))
        tower.zero_grad()
    deviation = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())

    seconds: dict[str, list[float]] = {name: [] for name in towers}
    for run in range(1 + args.runs):
        for name, tower in towers.items():
            start = time.perf_counter()
            for _ in range(5):
                (1 - nn.functional.cosine_similarity(tower(x), target)).mean().backward()
                optimisers[name].step()
                optimisers[name].zero_grad()
            if run:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / 5)
    slow, fast = (statistics.median(times) for times in seconds.values())
    print(f"{'timm, a step':16} {1000 * slow:7.1f} ms")
    print(f"{'ours':16} {1000 * fast:7.1f} ms  {slow / fast:.2f} times as fast  gradients differ by {deviation:.0e}")
