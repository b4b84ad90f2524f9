"""What sampling and training cost: counts of FLOPs and bytes, and a model of time on named GPUs.

Nothing is measured.

gpus        the figures of six GPUs, each with its source
kernels     time of one kernel from its grid, tiles and bytes, and what bounds it
trace       the kernels of a run, recorded on fake tensors: no GPU is needed
image       an image, stage by stage
published   the published way beside it
counts      FLOPs of the matrix products in closed form
training    memory and time of a training run: `fastfar plan`

Measurements are in `fastfar.bench`.
"""
