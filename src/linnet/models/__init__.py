"""Models built from mixers: the language-model decoder, its MLPs, generation, checkpoints on disk; and the
recurrent modules of ``torch.nn`` on the cell engine."""

from .compressor import Compressor
from .decoder import Decoder, DecoderConfig, DecoderLayer, DecoderOutput
from .encoder import Bidirectional, Encoder, EncoderOutput
from .generation import DecodingStep, Generation, GenerationStep, generate, sample, stream
from .io import atomic_folder, recover_folder
from .mlp import GeGLU, MixtureOfExperts, SwiGLU
from .parameters import learning_rate_caps, no_decay_names, parameter_groups
from .rnn import GRU, LSTM, RNN
from .seq2seq import Seq2Seq, beam_search

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Bidirectional",
    "Compressor",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "DecoderOutput",
    "DecodingStep",
    "Encoder",
    "EncoderOutput",
    "GeGLU",
    "Generation",
    "GenerationStep",
    "MixtureOfExperts",
    "Seq2Seq",
    "SwiGLU",
    "atomic_folder",
    "beam_search",
    "generate",
    "learning_rate_caps",
    "no_decay_names",
    "parameter_groups",
    "recover_folder",
    "sample",
    "stream",
]
