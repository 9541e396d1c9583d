"""The image tokenizer at the released one's size (docs/recipe.md "Image tokenizer"), on the paper's four sets.

The authors give no training settings. The sizes are theirs. The schedule is ours and has not been run to its end."""

data_root = "data/datasets"

# Encoder and codebook are as in the released file.
image_size = 224
ch = 128
ch_mult = (1, 1, 2, 2, 4, 4)
n_blocks = 2
latent_dim = 256
n_codes = 1024
unshuffle = 1  # none: the six levels halve 224 pixels five times, to 7

commitment = 0.25
reseed_after = 100

batch_size = 64
max_steps = 150_000
lr = 2e-4
weight_decay = 1e-4
warmup = 2_000
milestones = (100_000, 130_000)
dtype = "bfloat16"  # our choice for GPUs; the codes are searched in float32

eval_interval = 5_000
log_interval = 100
workers = 4
