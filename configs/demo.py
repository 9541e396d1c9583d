"""The made-up catalogue on two CPU cores: pre-training from random weights (bash demo.sh)."""

data_root = "data/demo"
tokenizer = "runs/vqvae_demo/last.pt"

size = "demo"  # Transformer 3 x 128
resnet = "resnet18"
width = 32
image_size = 64
init = "random"
n_attributes = 0  # as many as the catalogue has

# ITM learns slowest, and from negatives that MLM has taught it to tell apart
objectives = {"itm": 0.32, "itc": 0.20, "mlm": 0.20, "mpfc": 0.12, "mvc": 0.08, "pac": 0.08}
pac_scale = 16.0

batch_size = 32
max_steps = 1_900
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 100
milestones = (1_400, 1_750)
dropout = 0.0

eval_interval = 950
log_interval = 50
workers = 1
