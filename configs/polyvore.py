"""Fine-tuning for polyvore (docs/recipe.md "Fine-tuning")."""

task = "polyvore"
data_root = "data/datasets"
init = "pretrained"  # better: --init=CHECKPOINT of pre-training

batch_size = 64
max_steps = 8_000
lr = 1e-4
lr_factor = 1.0
weight_decay = 0.0
warmup = 1_000
milestones = (1_500, 5_000)

eval_interval = 500
split = "disjoint"
