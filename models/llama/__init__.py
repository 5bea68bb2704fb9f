"""Dense decoder of Llama and Qwen2 shape. Importing this package imports no torch."""
