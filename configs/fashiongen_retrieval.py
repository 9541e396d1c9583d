"""Fine-tuning for fashiongen_retrieval (docs/recipe.md "Fine-tuning")."""

task = "fashiongen_retrieval"
data_root = "data/datasets"
init = "pretrained"  # ResNet and BERT alone; --init=CHECKPOINT starts from pre-training

batch_size = 64
# 939 updates are one pass over the 60,147 products: 1 pass of warm-up, milestones after 30 and 60, 80 in all.
max_steps = 75_120
lr = 1e-5
lr_factor = 20.0  # image encoder, projection and heads learn 20 times faster than the Transformer
weight_decay = 1e-4
warmup = 939
milestones = (28_170, 56_340)

eval_interval = 2_000
