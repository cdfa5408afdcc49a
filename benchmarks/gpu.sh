#!/usr/bin/env bash
# The paper's rows and our speeds on a GPU: VGG-19 on CIFAR-100 trained from scratch, sparsely, pruned by 3x and 6x,
# fine-tuned naively and by Equivalent Pruning, in bf16, over seeds; then `fit`, EP's step and scoring, timed.
#
#     benchmarks/gpu.sh DATA OUT                   # all of it; the same command again goes on where it was
#     SEEDS="0" MINUTES=9 benchmarks/gpu.sh DATA OUT    # a slice: stops after 9 minutes, to be called again
#     SMALL=1 benchmarks/gpu.sh "" OUT             # little of everything on a CPU, on digits: that it runs, no accuracy
#
# Needs: one CUDA GPU of 16 GB or more, this package installed (make, or pip install -e .), and CIFAR-100 in DATA as
# `load_data("cifar100")` reads it (torchvision's files, class folders train/ and test/, or one .npz). Nothing is
# downloaded. Variables: SEEDS ("0 1 2"), SPEEDUPS ("3 6"), MINUTES (no limit), PYTHON (python), DEVICE (cuda).
# OUT gets a run folder a seed and speed-up, table.csv (the paper's row beside ours) and speeds.txt. A killed training
# goes on from its last checkpoint, at most five minutes old. Exit status 124: time was up, call it again.
set -euo pipefail

data=${1-} out=${2:?usage: benchmarks/gpu.sh DATA OUT}
seeds=${SEEDS:-0 1 2} speedups=${SPEEDUPS:-3 6} python=${PYTHON:-python} device=${DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -z "$data" ] || data=$(cd "$(dirname "$data")" && pwd)/$(basename "$data")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

options=(--amp bf16 --device "$device" --root "$data")
if [ -n "${SMALL-}" ]; then
    device=cpu speedups=${SPEEDUPS:-3} seeds=${SEEDS:-0}
    options=(--small --data digits --device cpu)
fi
end=$((SECONDS + 60 * ${MINUTES:-1000000}))

# What is left of the time, for one command; no command begins without any.
within() {
    local left=$((end - SECONDS))
    [ "$left" -gt 0 ] || exit 124
    timeout "$left" "$@"
}

# One seed at one speed-up, with further options; done before: nothing.
run() {
    local folder=$out/vgg19_${2}x_seed$1
    [ ! -f "$folder/results.json" ] || return 0
    within "$python" -m obc_tools run vgg19-cifar100 --speedup "$2" --seed "$1" --group-reduction sum \
        "${options[@]}" --out "$folder" --resume "${@:3}"
}

for seed in $seeds; do
    # The first speed-up trains the network from scratch, then sparsely; the others start from its weights.
    first=
    for speedup in $speedups; do
        if [ -z "$first" ]; then
            first=$out/vgg19_${speedup}x_seed$seed
            run "$seed" "$speedup" --weights scratch
        else
            run "$seed" "$speedup" --weights "$first/original.safetensors" --sparse-weights "$first/sparse.safetensors"
        fi
    done
done

"$python" - "$out" <<'PROGRAM'
import sys
import obc_tools as obc

folder = sys.argv[1]
table = obc.results_table(folder, paper="results/paper/table9_vgg19_cifar100.csv")
table.to_csv(f"{folder}/table.csv", index=False, float_format="%.4f")
print(table.round(2).to_string(index=False))
PROGRAM

# Whole or not at all, so that a killed measurement is made again.
if [ ! -f "$out/speeds.txt" ]; then
    if [ -n "${SMALL-}" ]; then
        loops=() scoring=(--device cpu --batch-size 8 --batches 2 --pairs 2)
    else
        loops=(benchmarks/training.py --root "$data" --data cifar100 --model vgg19 --device "$device" --images 50000
            --precisions no bf16 --speedup 3 --pairs 50)
        scoring=(--device "$device" --pairs 20)
    fi
    {
        [ ${#loops[@]} = 0 ] || within "$python" "${loops[@]}"
        within "$python" benchmarks/scoring_pass.py --model vgg19 --classes 100 --precisions no bf16 "${scoring[@]}"
    } >"$out/.speeds.new"
    mv "$out/.speeds.new" "$out/speeds.txt"
fi
cat "$out/speeds.txt"
