"""The paper's model on KAGL (README, "Train on public products"): pre-training on one GPU. Not run."""

data_root = "data/kagl"
sets = ("FashionGen",)  # prepare/catalogue.py writes KAGL in FashionGen's layout; the other sets are not there
image_tokenizer = "runs/vqvae_kagl/last.pt"  # README has its command; or the authors' released encoder

# The model is an ImageNet ResNet-50 and bert-base-uncased.
size = "base"
resnet = "resnet50"
image_size = 224
init = "pretrained"
n_attributes = 0  # as many as prepare/catalogue.py found

# The paper's mix without MVC, whose share goes to ITC. KAGL has one photo of each product.
objectives = {"itm": 0.15, "pac": 0.15, "itc": 0.40, "mlm": 0.15, "mpfc": 0.15}

batch_size = 256  # the paper's; where it does not fit into the GPU, --grad_accum=2 halves the memory
# About 156 updates are one pass over the 40,000 products of train, so this is about 64 passes. The paper has about 82.
max_steps = 10_000
lr = 1e-5  # suits BERT, which is trained already
lr_factor = 20.0  # image encoder, projection and heads learn 20 times faster
weight_decay = 1e-4
warmup = 1_250  # an eighth of the run, as in the paper
milestones = (3_750, 7_500)  # at 3/8 and 6/8 of the run, as in the paper
dtype = "bfloat16"  # our choice for one GPU; the authors trained in float32

eval_interval = 1_000
log_interval = 50
workers = 8
