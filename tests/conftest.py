import torch

# The tensors here are small: more threads only wait for each other, and pytest-xdist's workers
# use the cores.
torch.set_num_threads(1)
