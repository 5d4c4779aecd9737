"""Recipes, and what they share. Importing it makes a process safe to fork, before anything asks whether there is a GPU."""

import gc
import os

# The libraries make 400,000 objects that stay. At its usual count, 700, Python looks for garbage among them 900 times, which is a
# tenth of a start's processor time.
gc.set_threshold(10_000)

# DeepSpeed and other libraries ask as they are imported. By default the answer starts CUDA's driver in the process, whose forked
# ranks could not use it; NVML knows as well. (DeepSpeed sets it too, since 0.19.)
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
