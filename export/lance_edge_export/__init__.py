"""Turns a trained checkpoint into ONNX graphs and a verified bundle. Needs torch; the runtime does not."""
