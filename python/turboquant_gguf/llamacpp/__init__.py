"""llama.cpp from Python: its libraries and programs, model files, cache types, memory, logits."""
