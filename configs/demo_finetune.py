"""Fine-tuning on the made-up catalogue, any task: python finetune.py configs/demo_finetune.py --task=fashioniq."""

data_root = "data/demo"
init = "runs/demo/best.pt"  # or --init=random

image_size = 64  # as in configs/demo.py

# These sizes of the network are for --init=random. A checkpoint brings its own.
size = "demo"
resnet = "resnet18"
width = 16

batch_size = 32
max_steps = 90
lr = 5e-4
lr_factor = 1.0  # as in configs/demo.py: one rate for all of the model
warmup = 10
milestones = (70,)

eval_interval = 0  # validate only at the end
log_interval = 30
workers = 0  # on two cores a worker would take more time than it saves
