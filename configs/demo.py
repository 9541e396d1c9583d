"""The made-up catalogue on two CPU cores: pre-training from random weights (bash demo.sh)."""

data_root = "data/demo"
image_tokenizer = "runs/vqvae_demo/last.pt"

size = "demo"  # Transformer 2 x 192
resnet = "resnet18"
width = 16
image_size = 64
init = "random"
n_attributes = 0  # as many as the catalogue has

# A run of minutes needs other settings than the paper's (docs/recipe.md "Implementation details that matter").
mask_share = 0.4  # the paper's 0.15 hides too few words of these short texts
itm_candidates = 4  # with the hardest text of the whole batch, ITM stays at chance
pac_scale = 16.0  # the paper's 1.0 leaves the softmax nearly flat
objectives = {"itm": 0.30, "mlm": 0.22, "itc": 0.18, "mpfc": 0.15, "pac": 0.08, "mvc": 0.07}

batch_size = 32
max_steps = 2_000
# The weights are random everywhere, so all of the model learns at one rate, and at a higher one than a trained BERT.
lr = 1e-3
lr_factor = 1.0
weight_decay = 1e-4
warmup = 100
milestones = (1_600, 1_900)
dropout = 0.0  # the paper has 0.1; a run of minutes does without

eval_interval = 0  # validate only at the end
log_interval = 50
workers = 0  # on two cores a worker would take more time than it saves
