"""The image tokenizer for configs/mini.py: real photos on two CPU cores, about three minutes."""

data_root = "data/fashion-mini"

# encoder and codebook: patches of 32 pixels; less than half the cost of the ResNet they help to train
image_size = 96
ch = 16
ch_mult = (1, 2, 4, 8)
n_blocks = 1
latent_dim = 64
n_codes = 256
unshuffle = 4

batch_size = 64
max_steps = 480
lr = 2e-3
warmup = 30
milestones = (360, 450)
reseed_after = 20  # updates are few here: codes must find work soon

eval_interval = 0
log_interval = 30
workers = 1
