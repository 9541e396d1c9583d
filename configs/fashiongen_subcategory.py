"""Fine-tuning for fashiongen_subcategory (docs/recipe.md "Fine-tuning")."""

task = "fashiongen_subcategory"
data_root = "data/datasets"
init = "pretrained"  # better: --init=CHECKPOINT of pre-training

batch_size = 32
max_steps = 28_840
lr = 2e-5
lr_factor = 20.0
weight_decay = 1e-4
warmup = 0
milestones = (43_260, 86_520)

eval_interval = 2_000
