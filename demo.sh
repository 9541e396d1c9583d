#!/usr/bin/env bash
# Shows everything on a fresh machine with python3. It draws a made-up catalogue. It trains an image tokenizer and
# pre-trains with all six objectives. It fine-tunes for the five tasks, from the pre-trained checkpoint and from random
# weights, and prints one table. It ends with a search, whose picture is runs/demo/search.png.
# Its arguments go to every training run: bash demo.sh --max_steps=20
# SEEDS="0 1 2" bash demo.sh does it with each of these seeds, and the table gives the lowest and the highest result.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-$PWD/.venv}  # the folder of the virtual environment
if [ ! -e "$venv/installed" ]; then
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install -q -r requirements.txt
    touch "$venv/installed"
fi
# Threads that wait busily for each other slow the demo down beside another process. This makes them wait for a short time.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ]; then
    export GOMP_SPINCOUNT=1000
fi
export PATH="$venv/bin:$PATH"

python -m prepare.demo data/demo
python vqvae.py configs/vqvae_demo.py "$@"
tasks="fashiongen_retrieval fashioniq fashiongen_category fashiongen_subcategory polyvore"
runs=()
for seed in ${SEEDS:-0}; do
    run=runs/demo
    [ "$seed" = 0 ] || run=runs/demo-seed$seed
    runs+=("$run")
    python pretrain.py configs/demo.py --seed="$seed" --out_dir="$run" "$@"
    python -m tools.summary "$run"
    for task in $tasks; do
        python finetune.py configs/demo_finetune.py --task=$task --seed="$seed" --init="$run/best.pt" --out_dir="${run}_$task" "$@"
        python finetune.py configs/demo_finetune.py --task=$task --seed="$seed" --init=random --out_dir="${run}_$task-scratch" "$@"
    done
done
python - "$tasks" "${runs[@]}" <<'END'
import json, sys
tasks, *runs = sys.argv[1:]
print(f"\n{'task':24} {'metric, %':12} {'chance':>7} {'scratch':>12} {'pre-trained':>12}")
for task in tasks.split():
    cells = []
    for end in ("-scratch", ""):
        results = [json.load(open(f"{run}_{task}{end}/results.json")) for run in runs]
        protocol = next(name for name, value in results[0].items() if isinstance(value, dict))
        # A category of the demo has about 40 items, so R@30 and R@50 say little.
        metric = next(m for m in ("accuracy", "r@10", "mean_recall") if m in results[0][protocol]["metrics"])
        values = sorted({f"{100 * result[protocol]['metrics'][metric]:.1f}" for result in results}, key=float)
        cells.append("-".join(dict.fromkeys((values[0], values[-1]))))
    print(f"{task:24} {metric:12} {100 * results[0][protocol]['chance'][metric]:7.1f} {cells[0]:>12} {cells[1]:>12}")
END
python search.py --checkpoint "$run/best.pt" --gallery data/demo/FashionGen/val --text "black and red striped dress" --top 5 --out "$run/search.png"
