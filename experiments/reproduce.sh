#!/usr/bin/env bash
# Makes the figures and tables of docs/ from scratch, on CPU cores only:
#
#     experiments/reproduce.sh            every entry, as listed in the last lines
#     experiments/reproduce.sh tasks      one entry, with the runs it needs
#
# Skips an entry whose results/ENTRY.txt exists: delete that file to make the entry again. Resumes
# runs that were stopped. Runs go in parallel, one core each; timed entries come last, alone.
set -euo pipefail
cd "$(dirname "$0")/.."
results=experiments/results
mkdir -p runs held-out $results

runs="
base            main.py
rotated         main.py --rotate
wide            main.py WIDE
fast            main.py FAST
fast-kl         main.py FAST --beta 0.5
fast-follows    experiments/ablate.py unfounded-answers FAST
wide-log        experiments/ablate.py uniform-sizes WIDE
wide-batch-std  experiments/ablate.py batch-std WIDE
wide-no-std     experiments/ablate.py std WIDE
wide-4x32       main.py WIDE --prompts-per-step 4 --group-size 32
ex               main.py SHORT
ex-pairs         main.py SHORT --group-size 2 --prompts-per-step 64
ex-no-std        experiments/ablate.py std SHORT
ex-area          main.py SHORT --reward-weights 1,0,0
ex-rloo          experiments/ablate.py rloo SHORT
ex-epochs        main.py SHORT --beta 0 --inner-epochs 4
ex-gspo          experiments/ablate.py gspo SHORT --beta 0 --inner-epochs 4
ex-length        experiments/ablate.py paid-by-length SHORT
ex-fast          main.py SHORT FAST
ex-fast-follows  experiments/ablate.py unfounded-answers SHORT FAST
ex-ellipse       docs/ellipse.py SHORT
ex-perimeter     docs/perimeter.py SHORT
"
runs=${runs//SHORT/--steps 60}
runs=${runs//WIDE/--min-size 5 --max-size 35}
runs=${runs//FAST/--lr 4e-4}
declare -A tasks=(
  [base]="--min-size 20 --max-size 35 --no-rotate"
  [rotated]="--min-size 20 --max-size 35 --rotate"
  [wide]="--min-size 5 --max-size 35 --no-rotate"
)

train() { # NAME SEED: prints the command that starts or resumes the run, unless it is done
  local run=runs/$1-seed$2 program flags
  read -r program flags < <(awk -v name="$1" '$1 == name { $1 = ""; print }' <<< "$runs")
  [[ $program != *ablate.py ]] || { program="$program ${flags%% *}" flags=${flags#* }; }
  if [ ! -d "$run" ]; then
    echo "python $program --preset tiny --eval-every 0 $flags --seed $2 --name $1-seed$2 > $run.log"
  elif [ ! -d "$run/final" ]; then
    echo "python $program --resume $run > $run.log"
  fi
}

answer() { # NAME SEED TASK TEMPERATURE: prints the command for held-out answers, unless it is done
  local file=held-out/$1-seed$2-on-$3-at-$4 model=runs/$1-seed$2
  [ "$1" != before ] || model=tiny
  [ -f "$file.json" ] || echo "python evaluate.py $model ${tasks[$3]} --seed $2 --temperature $4" \
    "--examples 1024 --batch-size 128 --show 0 --plot $file.png --json $file.json > $file.txt"
}

side_by_side() { # runs the commands on stdin in parallel
  OMP_NUM_THREADS=1 xargs -r -d '\n' -P "$(nproc)" -I{} sh -c 'echo "{}"; {} 2>&1'
}

keep() { # NAME COMMAND...: writes the command, the commit and the output to results/NAME.txt
  printf '$ %s\ncommit %s\n\n' "${*:2}" \
    "$(python -c 'from harness.runlog import git_commit; print(git_commit())')" > $results/.partial
  "${@:2}" | tee -a $results/.partial
  mv $results/.partial "$results/$1.txt"
}

seeds="0 1 2 3 4"
models() { # TASK NAME...: trains each run with all seeds, then evaluates it on the task
  local name seed temperature
  for name in "${@:2}"; do
    for seed in $seeds; do [ "$name" = before ] || train "$name" "$seed"; done
  done | side_by_side
  for name in "${@:2}"; do
    for seed in $seeds; do
      for temperature in 0 1; do answer "$name" "$seed" "$1" "$temperature"; done
    done
  done | side_by_side
}

# --- the entries, in the order in which they run

pictures() { keep pictures python shapes.py --out docs/img; }

foreseen() { keep foreseen sh -c 'python main.py --dry-run || [ $? = 2 ]'; } # 2: does not fit

models_of_tasks() {
  local task
  for task in base rotated wide; do models $task before $task; done
}

tasks() {
  models_of_tasks
  cp held-out/base-seed0-on-base-at-0.png $results/evaluation.png
  python plot_rewards.py runs/base-seed0 --out $results
  keep tasks python experiments/figures.py tasks
}

split() {
  models_of_tasks
  keep split python experiments/figures.py split
}

samples() {
  local name model
  train base 0 | side_by_side
  for name in before base; do
    model=tiny
    [ $name = before ] || model=runs/$name-seed0
    [ -f held-out/$name-64.json ] || echo "python evaluate.py $model ${tasks[base]} --seed 0" \
      "--temperature 1 --samples 64 --batch-size 512 --show 0 --plot held-out/$name-64.png" \
      "--json held-out/$name-64.json > held-out/$name-64.txt"
  done | side_by_side
  keep samples python experiments/figures.py samples
}

rate() {
  models base base fast fast-kl fast-follows
  keep rate python experiments/figures.py rate
}

wide() {
  models wide wide wide-log wide-batch-std wide-no-std wide-4x32
  keep wide python experiments/figures.py wide
}

exercises() {
  local name
  for name in ex ex-pairs ex-no-std ex-area ex-rloo ex-epochs ex-gspo ex-length ex-fast \
    ex-fast-follows ex-ellipse ex-perimeter; do
    train $name 0
  done | side_by_side
  keep exercises python experiments/figures.py exercises
}

faults() { keep faults python benchmarks/faults.py --seed 1; }

speed() {
  pip install --quiet -r benchmarks/requirements.txt
  keep speed sh -ec "cd benchmarks; python step.py; python memory.py; python growth.py"
}

entries="pictures foreseen tasks split samples rate wide exercises faults speed"
for entry in ${*:-$entries}; do
  if [[ " $entries " != *" $entry "* ]]; then
    echo "reproduce.sh: $entry: must be one of: $entries" >&2
    exit 2
  elif [ -e "$results/$entry.txt" ]; then
    echo "$entry: skipped, $results/$entry.txt exists"
  else
    echo "$entry:"
    "$entry"
  fi
done
