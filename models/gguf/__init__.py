"""GGUF files, which llama.cpp runs. Only `writing` needs the package `gguf`."""
