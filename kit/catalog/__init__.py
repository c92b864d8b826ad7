"""What is known about GPUs and models: data/gpus.yaml and data/models, as frozen specs."""

from kit.catalog.architecture import ModelSpec
from kit.catalog.gpus import GpuSpec, gpu, gpu_keys
from kit.catalog.models import model, model_keys
from kit.catalog.shapes import AttentionGroup, MoeSpec, StateGroup

__all__ = ["AttentionGroup", "GpuSpec", "ModelSpec", "MoeSpec", "StateGroup", "gpu", "gpu_keys", "model", "model_keys"]
