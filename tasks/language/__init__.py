"""Language: LLaMA and GPT-2 on bytes, characters or tokens."""
