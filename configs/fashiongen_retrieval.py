"""Fine-tuning for fashiongen_retrieval (docs/recipe.md "Fine-tuning")."""

task = "fashiongen_retrieval"
data_root = "data/datasets"
init = "pretrained"  # better: --init=CHECKPOINT of pre-training

batch_size = 64
max_steps = 75_120
lr = 1e-5
lr_factor = 20.0
weight_decay = 1e-4
warmup = 939
milestones = (28_170, 56_340)

eval_interval = 2_000
