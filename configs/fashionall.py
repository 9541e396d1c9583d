"""The paper's pre-training (FashionViL 4.1; docs/recipe.md "Optimizer and schedule"): 4 GPUs, batch 256."""

data_root = "data/datasets"
image_tokenizer = "data/vqvae_ema_pp_224_7x7_encoder_fashionall.pth"  # the released encoder, or one of vqvae.py

# The model is an ImageNet ResNet-50 and bert-base-uncased.
size = "base"
resnet = "resnet50"
image_size = 224
init = "pretrained"
n_attributes = 2232  # the size of the authors' list of pseudo-attributes

# Every update picks one of these with its probability.
objectives = {"itm": 0.15, "pac": 0.15, "itc": 0.20, "mvc": 0.20, "mlm": 0.15, "mpfc": 0.15}

batch_size = 256
max_steps = 120_000
lr = 1e-5  # suits BERT, which is trained already
lr_factor = 20.0  # image encoder, projection and heads learn 20 times faster
weight_decay = 1e-4
warmup = 15_000
milestones = (45_000, 90_000)
dtype = "float32"  # as the authors trained

eval_interval = 2_000
log_interval = 100
workers = 4
