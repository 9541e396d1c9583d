"""Real photos on CPU cores: pre-training on fashion-mini from random weights, half an hour with --dtype=bfloat16."""

data_root = "data/fashion-mini"
image_tokenizer = "runs/vqvae_mini/last.pt"  # python vqvae.py configs/vqvae_mini.py

size = "mini"  # Transformer 3 x 192
resnet = "resnet18"
width = 32
image_size = 96
max_tokens = 40  # the title and the beginning of the description, at half the cost of 75
init = "random"
n_attributes = 566  # as many as fashion-mini has

# ITC gets most of this short run, because the validation measures retrieval.
objectives = {"itc": 0.62, "pac": 0.10, "mvc": 0.08, "itm": 0.08, "mlm": 0.06, "mpfc": 0.06}
itm_candidates = 4  # with the hardest text of the whole batch, ITM stays at chance
pac_scale = 16.0  # the paper's 1.0 leaves the softmax nearly flat

batch_size = 64
max_steps = 3_600
# The weights are random everywhere, so all of the model learns at one rate, and at a higher one than a trained BERT.
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 200
milestones = (2_700, 3_300)
dropout = 0.1

eval_interval = 1_200
log_interval = 50
workers = 1  # two cores: one trains, one loads
