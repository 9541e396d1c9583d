"""Real photos on two CPU cores: pre-training on fashion-mini from random weights, 36 minutes."""

data_root = "../shared/data/fashion-mini"
tokenizer = "runs/vqvae_mini/last.pt"  # python vqvae.py configs/vqvae_mini.py

size = "demo"  # Transformer 3 x 192
resnet = "resnet18"
width = 32
image_size = 96
init = "random"
n_attributes = 566

# contrastive learning gets most of a short run: it is what retrieval, the validation, asks for
objectives = {"itc": 0.5, "itm": 0.1, "pac": 0.1, "mvc": 0.1, "mlm": 0.1, "mpfc": 0.1}
pac_scale = 16.0

batch_size = 64
max_steps = 4_500
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 200
milestones = (3_300, 4_100)
dropout = 0.1

eval_interval = 1_500
log_interval = 50
workers = 1
