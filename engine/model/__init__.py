"""What is computed: a decoder-only transformer, from one set of parts for the Llama and the GPT-2 family."""

from engine.model.decoder import Decoder, Parts, stage_layers

__all__ = ["Decoder", "Parts", "stage_layers"]
