"""The made-up catalogue on two CPU cores: pre-training from random weights in about five minutes (bash demo.sh)."""

data_root = "data/demo"
tokenizer = "runs/vqvae_demo/last.pt"

size = "demo"  # Transformer 3 x 192
resnet = "resnet18"
width = 32
image_size = 64
init = "random"
n_attributes = 0  # as many as the catalogue has

objectives = {"itc": 0.35, "itm": 0.13, "pac": 0.13, "mvc": 0.13, "mlm": 0.13, "mpfc": 0.13}
pac_scale = 16.0

batch_size = 64
max_steps = 1_200
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 100
milestones = (900, 1_100)

eval_interval = 400
log_interval = 25
workers = 1
