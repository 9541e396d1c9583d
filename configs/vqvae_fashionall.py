"""The image tokenizer at the released one's size (docs/recipe.md "Image tokenizer"), on the paper's four sets.

The authors give no training settings: sizes are theirs, the schedule is ours and has not been run to its end."""

data_root = "data/datasets"

# encoder and codebook, as released
image_size = 224
ch = 128
ch_mult = (1, 1, 2, 2, 4, 4)
n_blocks = 2
latent_dim = 256
n_codes = 1024
unshuffle = 1

commitment = 0.25
reseed_after = 100

batch_size = 64
max_steps = 150_000
lr = 2e-4
weight_decay = 1e-4
warmup = 2_000
milestones = (100_000, 130_000)
dtype = "bfloat16"

eval_interval = 5_000
log_interval = 100
workers = 4
