"""The made-up catalogue on two CPU cores: pre-training from random weights in about five minutes (bash demo.sh)."""

data_root = "data/demo"
tokenizer = "runs/vqvae_demo/last.pt"

size = "demo"  # Transformer 3 x 192
resnet = "resnet18"
width = 32
image_size = 64
init = "random"
n_attributes = 0  # as many as the catalogue has

objectives = {"itc": 0.25, "itm": 0.25, "mlm": 0.14, "mpfc": 0.14, "mvc": 0.11, "pac": 0.11}
pac_scale = 16.0

batch_size = 64
max_steps = 1_000
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 100
milestones = (700, 900)

eval_interval = 500
log_interval = 25
workers = 1
