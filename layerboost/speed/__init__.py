"""Says how fast a model decodes: measured in transformers and vLLM, and predicted from bytes and from timings."""
