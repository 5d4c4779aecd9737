"""Recipes, and what they share. Importing it makes a process safe to fork, before anything can import DeepSpeed."""

import os

# DeepSpeed asks whether there is a GPU as it is imported. By default the answer starts CUDA's driver in the process, whose forked
# ranks could not use it; NVML knows as well.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
