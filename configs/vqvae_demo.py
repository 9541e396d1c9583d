"""The image tokenizer for configs/demo.py: the made-up catalogue on two CPU cores, half a minute."""

data_root = "data/demo"

# Patches have 32 pixels. unshuffle folds 4 x 4 pixels into channels, and the four levels halve the map three times.
# The encoder costs less than half of the ResNet that it helps to train.
image_size = 64
ch = 12
ch_mult = (1, 2, 4, 4)
n_blocks = 1
latent_dim = 64
n_codes = 32  # the made-up pictures have few kinds of patches
unshuffle = 4

batch_size = 32
max_steps = 300
lr = 2e-3
warmup = 20
milestones = (220, 280)
reseed_after = 20  # updates are few, so a code without patches must soon get some

eval_interval = 0  # validate only at the end
eval_images = 200
log_interval = 40
workers = 0  # on two cores a worker would take more time than it saves
