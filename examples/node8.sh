#!/usr/bin/env bash
# One node with eight GPUs: pairs, then training. After any interruption, run it again: both
# continue where they stopped.
set -euo pipefail
teacher=sd15 # a folder; the recipe uses the same name
torch="torchrun --standalone --nproc-per-node 8"

# Ranks divide the shards by index; finished ones are skipped. 3 M pairs in shards of 1000 are 3 000
# files of 32 MB.
$torch -m diffusion2gan pairs --teacher "$teacher" --prompts prompts.txt --count 3000000 --shard-size 1000 \
  --solver ddim --guidance-scale 3 --batch-size 64 --device cuda --out pairs
diffusion2gan pairs verify pairs --deep 8 --teacher "$teacher"

# --max-restarts: if a rank is lost, torchrun restarts all ranks from the last checkpoint.
$torch --max-restarts 3 -m diffusion2gan distill sd15 --set gradient_accumulation_steps=8 --pairs pairs --out runs/sd15
diffusion2gan export runs/sd15 --out export/sd15 --half
