#!/usr/bin/env bash
# Shows everything on a fresh machine with python3. It draws a made-up catalogue. It trains an image tokenizer and
# pre-trains with all six objectives. It fine-tunes for the five tasks, from the pre-trained checkpoint and from random
# weights, and prints one table. It ends with a search, whose picture is runs/demo/search.png.
# Its arguments go to every training run: bash demo.sh --max_steps=20
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -e .venv/installed ]; then
    python3 -m venv .venv
    .venv/bin/python -m pip install -q -r requirements.txt
    touch .venv/installed
fi
# Threads that wait busily for each other slow the demo down beside another process. This makes them wait for a short time.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ]; then
    export GOMP_SPINCOUNT=1000
fi
export PATH="$PWD/.venv/bin:$PATH"

python -m prepare.demo data/demo
python vqvae.py configs/vqvae_demo.py "$@"
python pretrain.py configs/demo.py "$@"
python -m tools.summary runs/demo
tasks="fashiongen_retrieval fashioniq fashiongen_category fashiongen_subcategory polyvore"
for task in $tasks; do
    # OCIR gets 15 updates, because its rule is so simple that after 90 both starts have 100 %.
    few=$([ $task != polyvore ] || echo --max_steps=15 --warmup=3 --milestones=12)
    python finetune.py configs/demo_finetune.py --task=$task --out_dir=runs/demo_$task $few "$@"
    python finetune.py configs/demo_finetune.py --task=$task --out_dir=runs/demo_$task-scratch --init=random $few "$@"
done
python - $tasks <<'END'
import json, sys
print(f"\n{'task':24} {'metric, %':12} {'chance':>7} {'scratch':>8} {'pre-trained':>12}")
for task in sys.argv[1:]:
    runs = [json.load(open(f"runs/demo_{task}{end}/results.json")) for end in ("-scratch", "")]
    protocol = next(name for name, value in runs[0].items() if isinstance(value, dict))
    # A category of the demo has about 40 items, so R@30 and R@50 say little.
    metric = next(m for m in ("accuracy", "r@10", "mean_recall") if m in runs[0][protocol]["metrics"])
    scratch, ours = (100 * run[protocol]["metrics"][metric] for run in runs)
    print(f"{task:24} {metric:12} {100 * runs[0][protocol]['chance'][metric]:7.1f} {scratch:8.1f} {ours:12.1f}")
END
python search.py --checkpoint runs/demo/best.pt --gallery data/demo/FashionGen/val --text "black and red striped dress" --top 5 --out runs/demo/search.png
