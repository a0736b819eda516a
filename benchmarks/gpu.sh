#!/usr/bin/env bash
# The measurements that need a GPU, in three parts of less than ten minutes each:
#   1  the loss alone at real sizes
#   2  training steps, and the memory of each recipe
#   3  the complete method; latency of one step
# Usage: benchmarks/gpu.sh 1 2 3 (all three by default). GPU: not measured yet.
# Results: a line each on stdout, and JSON files in OUT (default work/gpu). Nothing else is written.
# Environment: TINY=1 runs the same commands at pocket size on a CPU, as a test. PYTHON, OUT and
# SECONDS_A_PART (default 570) change the interpreter, the output folder and the time limit of a part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-work/gpu} LIMIT=${SECONDS_A_PART:-570}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1
status=0

# Runs a benchmark within the time that remains for this part. A failure is reported, and the other
# benchmarks continue.
bench() {
  local left=$((LIMIT - (SECONDS - begun)))
  if [ "$left" -le 0 ]; then
    echo "left out, no time: $*" && status=1
    return
  fi
  echo "== $*"
  timeout "$left" "$PYTHON" "benchmarks/$1.py" "${@:2}" --out "$OUT/$1.json" || { echo "failed: $*" && status=1; }
}

if [ -n "${TINY:-}" ]; then
  sizes=(pocket) device=(--device cpu) precision=() dtype=() half=() recipes=()
  step=(--repeats 1 --batch 2) loss=(--repeats 1) one=(--repeats 2 --steps 2)
  first=pocket large=()
else
  sizes=(sd15 sdxl) device=(--device cuda) precision=(--precision bfloat16) dtype=(--dtype bfloat16)
  half=(--precision float16) recipes=(sd15-lora-24gb sd15 sdxl-lora-24gb)
  step=(--repeats 10 --batch 32) loss=(--repeats 20) one=(--repeats 20)
  first=sd15 large=(--size sdxl --batch 4 --gradient-checkpointing --repeats 5)
fi

part_1() {
  for size in "${sizes[@]}"; do
    bench loss_cost --size "$size" "${device[@]}" "${loss[@]}"
    [ ${#dtype[@]} -eq 0 ] || bench loss_cost --size "$size" "${device[@]}" "${loss[@]}" "${dtype[@]}" --compile
  done
}

part_2() {
  bench train_step --size "$first" "${device[@]}" "${precision[@]}" "${step[@]}" --rows mse e_latent_lpips
  bench train_step --size "$first" "${device[@]}" "${precision[@]}" "${step[@]}" --rows mse e_latent_lpips --channels-last
  bench train_step --size "$first" "${device[@]}" "${precision[@]}" "${step[@]}" --rows mse --fused
  [ -n "${TINY:-}" ] || bench train_step --size "$first" "${device[@]}" "${precision[@]}" "${step[@]}" --rows mse --compile
  for recipe in "${recipes[@]}"; do
    bench train_step --size "${recipe%%-*}" "${device[@]}" "${precision[@]}" --repeats 1 --recipe "$recipe"
  done
}

part_3() {
  bench train_step --size "$first" "${device[@]}" "${precision[@]}" "${step[@]}" --gradient-checkpointing \
    --rows with_d with_d_and_r1 lora teacher_features
  [ ${#large[@]} -eq 0 ] || bench train_step "${device[@]}" "${precision[@]}" "${large[@]}" --rows mse e_latent_lpips lora
  for size in "${sizes[@]}"; do
    bench one_step --size "$size" "${device[@]}" "${half[@]}" "${one[@]}"
    bench one_step --size "$size" "${device[@]}" "${half[@]}" "${one[@]}" --channels-last
  done
}

for part in "${@:-1 2 3}"; do
  for number in $part; do
    begun=$SECONDS
    echo "=== part $number"
    "part_$number"
    echo "=== part $number took $((SECONDS - begun)) s"
  done
done
exit "$status"
