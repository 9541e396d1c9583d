"""Fine-tuning for fashioniq (docs/recipe.md "Fine-tuning")."""

task = "fashioniq"
data_root = "data/datasets"
init = "pretrained"  # ResNet and BERT alone; --init=CHECKPOINT starts from pre-training

batch_size = 32
# 562 updates are one pass over the 18,000 triplets: 5 passes of warm-up, milestones after 30 and 50, 80 in all.
max_steps = 44_960
lr = 1e-5
lr_factor = 20.0  # image encoder, projection and heads learn 20 times faster than the Transformer
weight_decay = 1e-4
warmup = 2_810
milestones = (16_860, 28_100)

eval_interval = 2_000
