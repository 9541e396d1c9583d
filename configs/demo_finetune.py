"""Fine-tuning on the made-up catalogue, any task: python finetune.py configs/demo_finetune.py --task=fashioniq."""

data_root = "data/demo"
init = "runs/demo/best.pt"  # or random

# sizes of a random start; a checkpoint brings its own
size = "demo"
resnet = "resnet18"
width = 16
image_size = 64

batch_size = 32
max_steps = 90
lr = 5e-4
lr_factor = 1.0
warmup = 10
milestones = (70,)

eval_interval = 0
log_interval = 30
workers = 0
