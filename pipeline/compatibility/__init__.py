"""What a model is made of, and which backends can quantize it: read from config.json and safetensors headers alone."""
