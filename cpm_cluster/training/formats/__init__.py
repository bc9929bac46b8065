"""Weights as others keep them: CPM-9G's ``.pt``, Hugging Face's Llama folders, PEFT's adapters, OpenDelta's deltas.

Inside the trainer weights are a mapping from CPM-9G's names to tensors that are read when they are asked for, so that
no more of a model of 100B parameters is in memory than somebody looks at.
"""
