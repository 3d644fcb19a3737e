#!/usr/bin/env bash
# Trains a model of 164 million parameters from scratch on one GPU: a cold start on synthetic
# answers, then GRPO on all three tasks in parallel, then held-out answers before and after.
#
#     experiments/larger.sh                   # everything, into runs/ and held-out/
#     experiments/larger.sh cold              # the model to start from
#     SEED=1 STEPS=300 experiments/larger.sh grpo
#     experiments/larger.sh answers
#
# It is not Qwen2.5-VL-7B. Its curves show how the program trains a model larger than tiny/.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs held-out
seed=${SEED:-0} steps=${STEPS:-200}
flags="--prompts-per-step 8 --group-size 16 --max-new-tokens 56 --lr 2e-5 --workers 3"
flags="$flags --micro-batch 8 --save-every 0 --no-save-optimizer --steps $steps --seed $seed"
declare -A tasks=(
  [base]="--min-size 20 --max-size 35 --no-rotate"
  [rotated]="--min-size 20 --max-size 35 --rotate"
  [wide]="--min-size 5 --max-size 35 --no-rotate"
)

cold() {
  python cold_start.py --from-scratch --size small --workers 12 --batch-size 64 \
    --lr 3e-4 --out runs/small
}

grpo() {
  for task in "${!tasks[@]}"; do
    # shellcheck disable=SC2086
    python main.py --model runs/small $flags ${tasks[$task]} --name "small-$task-seed$seed" \
      > "runs/small-$task-seed$seed.log" 2>&1 &
  done
  wait
  python plot_rewards.py runs/small-*-seed* --out runs
}

answers() {
  for task in "${!tasks[@]}"; do
    for model in small "small-$task-seed$seed"; do
      for temperature in 0 1; do
        file="held-out/$model-on-$task-at-$temperature"
        # shellcheck disable=SC2086
        python evaluate.py "runs/$model" ${tasks[$task]} --seed "$seed" \
          --temperature "$temperature" --max-new-tokens 56 --batch-size 128 --show 1 \
          --json "$file.json" --plot "$file.png" | tee "$file.txt"
      done
    done
  done
}

for part in ${*:-cold grpo answers}; do "$part"; done
