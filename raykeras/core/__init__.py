"""Configuration, errors, events and other basics of a run. Imports neither Ray nor TensorFlow."""
