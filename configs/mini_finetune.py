"""Fine-tuning on fashion-mini, any task: python finetune.py configs/mini_finetune.py --task=fashioniq."""

data_root = "data/fashion-mini"
init = "runs/mini/best.pt"  # or --init=random

image_size = 96  # both as in configs/mini.py
max_tokens = 40

# These sizes of the network are for --init=random. A checkpoint brings its own.
size = "mini"
resnet = "resnet18"
width = 32

batch_size = 64
max_steps = 400
lr = 5e-4
lr_factor = 1.0  # as in configs/mini.py: one rate for all of the model
warmup = 40
milestones = (300, 370)

eval_interval = 0  # validate only at the end
log_interval = 50
workers = 1  # two cores: one trains, one loads
