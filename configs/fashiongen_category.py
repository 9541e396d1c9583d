"""Fine-tuning for fashiongen_category (docs/recipe.md "Fine-tuning")."""

task = "fashiongen_category"
data_root = "data/datasets"
init = "pretrained"  # ResNet and BERT alone; --init=CHECKPOINT starts from pre-training

batch_size = 32
max_steps = 28_840
lr = 2e-5
lr_factor = 20.0  # image encoder, projection and heads learn 20 times faster than the Transformer
weight_decay = 1e-4
warmup = 0  # the original has none for this task
# These are the original's. They lie past the last update, so the learning rate stays constant.
milestones = (43_260, 86_520)

eval_interval = 2_000
