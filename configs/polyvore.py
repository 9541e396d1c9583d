"""Fine-tuning for polyvore (docs/recipe.md "Fine-tuning")."""

task = "polyvore"
data_root = "data/datasets"
init = "pretrained"  # the ResNet alone; --init=CHECKPOINT starts from pre-training

batch_size = 64
max_steps = 8_000
# The model of this task has no Transformer. The original gives it one rate for all parameters and no weight decay.
lr = 1e-4
lr_factor = 1.0
weight_decay = 0.0
warmup = 1_000
milestones = (1_500, 5_000)

eval_interval = 500  # the run is short: 8,000 updates
split = "disjoint"  # no item of the test part occurs in training; the other choice is nondisjoint
