"""How checkpoints store quantized layers: one module per format, behind one Protocol."""
