"""A folder of images becomes an nnU-Net raw dataset for pre-training without labels: what ``umit import`` does.

One file is judged by one function, in a process of its own (`judge`), from its bytes outwards: suffix, header, declared
size, then the voxels as a stream, and only then as an image in memory. `discover` finds the files, `workers` runs the
judge and survives its death, `settle` decides what can only be decided with all verdicts at hand, `dataset` writes.
Imports run that way; this room needs neither torch nor a planner.
"""
