"""The made-up catalogue on two CPU cores: pre-training from random weights (bash demo.sh)."""

data_root = "data/demo"
image_tokenizer = "runs/vqvae_demo/last.pt"

size = "demo"  # Transformer 2 x 192
resnet = "resnet18"
width = 16
image_size = 64
init = "random"
n_attributes = 0  # as many as the catalogue has

# What counts in minutes is how much an update asks: more masked words, and negatives that are not the hardest of all.
mask_share = 0.4
itm_candidates = 4
pac_scale = 16.0
objectives = {"itm": 0.30, "mlm": 0.22, "itc": 0.18, "mpfc": 0.15, "pac": 0.08, "mvc": 0.07}

batch_size = 32
max_steps = 2_000
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 100
milestones = (1_600, 1_900)
dropout = 0.0

eval_interval = 0
log_interval = 50
workers = 0  # small pictures: a worker would take more from the two cores than it gives
