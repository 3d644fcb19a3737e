#!/usr/bin/env bash
# Makes the figures and tables of docs/ from scratch, on CPU cores only:
#
#     experiments/reproduce.sh            every entry, as listed in the last lines
#     experiments/reproduce.sh gap        one entry, with the runs it needs
#
# Skips an entry whose results/ENTRY.txt exists: delete that file to make the entry again. Resumes
# runs that were stopped. Runs go in parallel, one core each; timed entries come last, alone.
set -euo pipefail
cd "$(dirname "$0")/.."
results=experiments/results
mkdir -p runs held-out $results

runs="
base                  main.py
rotated               main.py --rotate
wide                  main.py WIDE
wide-root             main.py WIDE --correctness root
wide-log              main.py WIDE --correctness log
wide-group4           main.py WIDE --group-size 4
wide-group16          main.py WIDE --group-size 16
wide-temp0.6          main.py WIDE --temperature 0.6
cold100               cold_start.py WIDE --steps 100 COLD
wide-coldgrpo         main.py WIDE --steps 100 --model runs/cold100-seedSEED
wide-coldonly         cold_start.py WIDE --steps 200 COLD
wide-beta0            main.py WIDE --beta 0
wide-nostd            experiments/ablate.py std WIDE
wide-nostop           experiments/ablate.py stop-token WIDE
wide-temp0.6unscored  experiments/ablate.py scored-temperature WIDE --temperature 0.6
wide-bf16             main.py WIDE --dtype bfloat16
wide-bf16-plain       experiments/ablate.py kahan WIDE --dtype bfloat16
wide-bf16-slow        main.py WIDE --dtype bfloat16 --lr 1.5e-5
wide-bf16-slow-plain  experiments/ablate.py kahan WIDE --dtype bfloat16 --lr 1.5e-5
"
runs=${runs//WIDE/--min-size 5 --max-size 35}
runs=${runs//COLD/--max-rotation 0 --sloppy 0 --mistakes 0 --area-noise 0 --batch-size 8 --lr 5e-4}
declare -A tasks=(
  [base]="--min-size 20 --max-size 35 --no-rotate"
  [rotated]="--min-size 20 --max-size 35 --rotate"
  [wide]="--min-size 5 --max-size 35 --no-rotate"
)

train() { # NAME SEED: prints the command that starts or resumes the run, unless it is done
  local run=runs/$1-seed$2 program flags
  read -r program flags < <(awk -v name="$1" '$1 == name { $1 = ""; print }' <<< "$runs")
  [[ $program != *ablate.py ]] || { program="$program ${flags%% *}" flags=${flags#* }; }
  if [ "$program" = cold_start.py ]; then
    [ -f "$run/model.safetensors" ] ||
      echo "rm -rf $run; python $program --model tiny $flags --seed $2 --out $run > $run.log"
  elif [ ! -d "$run" ]; then
    echo "python $program --preset tiny --eval-every 0 ${flags//SEED/$2} --seed $2" \
      "--name $1-seed$2 > $run.log"
  elif [ ! -d "$run/final" ]; then
    echo "python $program --resume $run > $run.log"
  fi
}

answer() { # NAME SEED TASK TEMPERATURE: prints the command for held-out answers, unless it is done
  local file=held-out/$1-seed$2-on-$3-at-$4 model=runs/$1-seed$2
  [ "$1" != before ] || model=tiny
  [ -f "$file.json" ] || echo "python evaluate.py $model ${tasks[$3]} --seed $2 --temperature $4" \
    "--show 0 --plot $file.png --json $file.json > $file.txt"
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

seeds="0 1 2"
models() { # TASKS NAME...: trains each run with all seeds, then evaluates it on the tasks
  local name seed task temperature
  for name in "${@:2}"; do
    for seed in $seeds; do [ "$name" = before ] || train "$name" "$seed"; done
  done | side_by_side
  for name in "${@:2}"; do
    for seed in $seeds; do
      for task in $1; do
        for temperature in 0 1; do answer "$name" "$seed" "$task" "$temperature"; done
      done
    done
  done | side_by_side
}

# --- the entries, in the order in which they run

pictures() { keep pictures python shapes.py --out docs/img; }

foreseen() { keep foreseen sh -c 'python main.py --dry-run || [ $? = 2 ]'; } # 2: does not fit

base() {
  models base before base
  cp held-out/base-seed0-on-base-at-0.png $results/evaluation.png
  python plot_rewards.py runs/base-seed0 --out $results
  python report.py runs/base-seed0
  ! command -v chromium > /dev/null || chromium --headless --no-sandbox --window-size=1200,1240 \
    --screenshot=docs/img/report.png "file://$PWD/runs/base-seed0/report.html" 2> /dev/null
  keep base python experiments/figures.py base
}

variations() {
  models "" base rotated wide
  keep variations python experiments/figures.py variations
}

transfer() {
  models "base rotated wide" before base rotated wide
  keep transfer python experiments/figures.py transfer
}

gap() {
  models wide before wide wide-root wide-log wide-group4 wide-group16 wide-temp0.6 \
    cold100 wide-coldonly
  models wide wide-coldgrpo # starts from cold100
  keep gap python experiments/figures.py gap
}

confirm() {
  seeds="3 4 5" models wide wide wide-log wide-group16
  keep confirm python experiments/figures.py confirm
}

ablations() {
  models wide wide wide-group4 wide-group16 wide-nostd wide-beta0 wide-temp0.6 \
    wide-temp0.6unscored wide-nostop
  keep ablations python experiments/figures.py ablations
}

bf16() {
  models wide wide wide-bf16 wide-bf16-plain wide-bf16-slow wide-bf16-slow-plain
  keep bf16 python experiments/figures.py bf16
}

faults() { keep faults python benchmarks/faults.py --seed 1; }

speed() {
  pip install --quiet -r benchmarks/requirements.txt
  keep speed sh -ec "cd benchmarks; python step.py; python memory.py; python growth.py"
}

entries="pictures foreseen base variations transfer gap confirm ablations bf16 faults speed"
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
