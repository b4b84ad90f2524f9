"""What sampling costs: counts of FLOPs, a model of time on named GPUs, and measurements.

gpus        the figures of six GPUs, each with its source
kernels     time of one kernel from its grid, tiles and bytes, and what bounds it
trace       the kernels of a run, recorded on fake tensors: no GPU is needed
image       an image, stage by stage
published   the published way beside it
counts      FLOPs of the matrix products in closed form
variants    the ways to compute an image that are measured
measure     their times on the machine at hand; head_kernels: those of single kernels
rows        what a row of a benchmark says; report: all of it as text
"""
