"""Instruction tuning: chat rows in, batches of token ids with a mask of what is learned out."""
