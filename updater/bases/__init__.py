"""Where bases come from: any open_clip model and any Hugging Face VLM is registered, or fetched from the artifacts."""
