"""The image tokenizer for configs/demo.py: the made-up catalogue on two CPU cores, half a minute."""

data_root = "data/demo"

# encoder and codebook: patches of 32 pixels; less than half the cost of the ResNet they help to train
image_size = 64
ch = 12
ch_mult = (1, 2, 4, 4)
n_blocks = 1
latent_dim = 64
n_codes = 32
unshuffle = 4

batch_size = 32
max_steps = 300
lr = 2e-3
warmup = 20
milestones = (220, 280)
reseed_after = 20  # updates are few here: codes must find work soon

eval_interval = 0
eval_images = 200
log_interval = 40
workers = 0
