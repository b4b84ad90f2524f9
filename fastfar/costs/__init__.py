"""What sampling costs: counts of FLOPs, and a model of time on named GPUs; nothing is measured.

gpus        the figures of six GPUs, each with its source
kernels     time of one kernel from its grid, tiles and bytes, and what bounds it
trace       the kernels of a run, recorded on fake tensors: no GPU is needed
image       an image, stage by stage
published   the published way beside it
counts      FLOPs of the matrix products in closed form

Measurements are in `fastfar.bench`.
"""
