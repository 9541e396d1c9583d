"""Fine-tuning for fashioniq (docs/recipe.md "Fine-tuning")."""

task = "fashioniq"
data_root = "data/datasets"
init = "pretrained"  # better: --init=CHECKPOINT of pre-training

batch_size = 32
max_steps = 44_960
lr = 1e-5
lr_factor = 20.0
weight_decay = 1e-4
warmup = 2_810
milestones = (16_860, 28_100)

eval_interval = 2_000
