"""What goes to and comes from the Hub: model directories, their cards, released checkpoints, ONNX files."""
