#!/usr/bin/env bash
# Everything on a fresh machine with python3, about 8 minutes on two cores after the installation: a made-up catalogue,
# an image tokenizer, pre-training with all six objectives, retrieval on held-out products.
# Arguments go to every training stage: bash demo.sh --max_steps=20
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
    .venv/bin/python -m pip install -q -r requirements.txt
fi
python=.venv/bin/python
$python prepare/demo.py data/demo
$python vqvae.py configs/vqvae_demo.py "$@"
$python pretrain.py configs/demo.py "$@"
