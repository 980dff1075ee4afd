"""Models built from mixers: the language-model decoder, its MLPs, generation, and checkpoints on disk."""

from .compressor import Compressor
from .decoder import Decoder, DecoderConfig, DecoderLayer, DecoderOutput
from .generation import DecodingStep, Generation, GenerationStep, generate, sample, stream
from .io import atomic_folder, recover_folder
from .mlp import MixtureOfExperts, SwiGLU
from .parameters import no_decay_names, parameter_groups

__all__ = [
    "Compressor",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "DecoderOutput",
    "DecodingStep",
    "Generation",
    "GenerationStep",
    "MixtureOfExperts",
    "SwiGLU",
    "atomic_folder",
    "generate",
    "no_decay_names",
    "parameter_groups",
    "recover_folder",
    "sample",
    "stream",
]
