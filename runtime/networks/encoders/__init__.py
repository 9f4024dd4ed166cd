"""Text encoders: directories of Hugging Face and sentence-transformers as networks with `embed`."""
