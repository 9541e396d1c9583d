"""The image tokenizer for configs/mini.py: real photos on two CPU cores, about five minutes."""

data_root = "data/fashion-mini"

# Patches have 32 pixels. unshuffle folds 4 x 4 pixels into channels, and the four levels halve the map three times.
# The encoder costs less than half of the ResNet that it helps to train.
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
reseed_after = 20  # updates are few, so a code without patches must soon get some

eval_interval = 0  # validate only at the end
log_interval = 30
workers = 1  # two cores: one trains, one loads
